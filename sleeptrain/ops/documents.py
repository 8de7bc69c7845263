"""The effect of resets and pads on a short convolution: which taps and which entries of the tail exist."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Documents(NamedTuple):
    """The effect of resets and pads on a convolution. A field is None if it has no effect."""

    joined_WBT1: torch.Tensor | None  # bool, for each lag: the token `lag` positions back is of the same document
    slot_BW: torch.Tensor | None  # int64: positions of the tail's entries in the history (tail, then x)
    present_BW1: torch.Tensor | None  # bool; False: the entry does not exist, so the tail is zero there


def document_facts(
    num_tokens: int, reach: int, reset_BT: torch.Tensor | None, valid_BT: torch.Tensor | None
) -> Documents:
    """The `Documents` of a convolution whose taps reach `reach` tokens back."""
    mask_BT = reset_BT if reset_BT is not None else valid_BT
    if mask_BT is None:
        return Documents(None, None, None)
    # Position in the history plus 1; 0 for entries that may not enter the tail.
    positions = torch.arange(1, reach + num_tokens + 1, device=mask_BT.device).expand(len(mask_BT), -1)
    joined = None
    if reset_BT is not None:
        document = F.pad(reset_BT.long().cumsum(1), (reach, 0))
        earlier = [document[:, reach - lag : reach - lag + num_tokens] for lag in range(reach + 1)]
        joined = torch.stack([document[:, reach:] == number for number in earlier]).unsqueeze(-1)
        positions = positions * (document == document[:, -1:])
    if valid_BT is not None:
        positions = positions * F.pad(valid_BT, (reach, 0), value=True)
    last = positions.topk(reach, dim=1).values.flip(1)
    return Documents(joined, (last - 1).clamp_min(0), (last > 0).unsqueeze(-1))
