"""Labels as transformers gives them, one to each token of its own: what is to be predicted where."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sleeptrain.data.batch import IGNORE
from sleeptrain.sleep.full_logits import compact


def targets(labels: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: at each token the label of the next one of its row, IGNORE where there is none; pads are passed over."""
    order_BT, counts_B = compact(valid_BT)
    following = F.pad(labels.gather(1, order_BT)[:, 1:], (0, 1), value=IGNORE)
    at = torch.arange(labels.shape[1], device=labels.device)
    following = following.masked_fill(at >= counts_B[:, None] - 1, IGNORE)
    return torch.full_like(labels, IGNORE).scatter(1, order_BT, following)


def with_label(labels: torch.Tensor, valid_BT: torch.Tensor, window: int) -> torch.Tensor:
    """[B, T]: True for the tokens of windows that have a target."""
    index_BT = (valid_BT.cumsum(1) - 1).clamp(min=0) // window
    has_BK = torch.zeros_like(index_BT).scatter_add(1, index_BT, (targets(labels, valid_BT) != IGNORE).long())
    return valid_BT & (has_BK.gather(1, index_BT) > 0)


def mean_loss(logits: torch.Tensor, labels: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """In nats, over the tokens that have a target among the last columns, those of `logits` [B, columns, V]."""
    wanted = targets(labels, valid_BT)[:, -logits.shape[1] :]
    return F.cross_entropy(logits[wanted != IGNORE], wanted[wanted != IGNORE])
