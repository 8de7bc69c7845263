"""Targets from labels of transformers, which stand at their own token, not shifted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sleeptrain.data.batch import IGNORE
from sleeptrain.sleep.full_logits import compact


def targets(labels: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: at each token the label of the row's next token, pads skipped; IGNORE at the last and at pads."""
    order_BT, counts_B = compact(valid_BT)
    following = F.pad(labels.gather(1, order_BT)[:, 1:], (0, 1), value=IGNORE)
    positions = torch.arange(labels.shape[1], device=labels.device)
    following = following.masked_fill(positions >= counts_B[:, None] - 1, IGNORE)
    return torch.full_like(labels, IGNORE).scatter(1, order_BT, following)


def with_label(labels: torch.Tensor, valid_BT: torch.Tensor, window: int) -> torch.Tensor:
    """bool [B, T]: True for tokens in windows with a target. window: L in tokens."""
    index_BT = (valid_BT.cumsum(1) - 1).clamp(min=0) // window
    has_BK = torch.zeros_like(index_BT).scatter_add(1, index_BT, (targets(labels, valid_BT) != IGNORE).long())
    return valid_BT & (has_BK.gather(1, index_BT) > 0)


def mean_loss(logits: torch.Tensor, labels: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy in nats over the targets in the last columns, those of `logits` [B, columns, V]."""
    last = targets(labels, valid_BT)[:, -logits.shape[1] :]
    return F.cross_entropy(logits[last != IGNORE], last[last != IGNORE])
