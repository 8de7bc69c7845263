"""The inputs of rounds: cut out of a batch on the CPU ahead of the rounds, and sent to the device in one copy.

A round itself reads nothing back from the device and sends nothing to it, so a GPU never waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten

from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.sleep.round_layouts import RoundLayouts
from sleeptrain.sleep.rounds import Round

ALIGNMENT = 16  # bytes; each tensor of a packed copy starts at a multiple of it


@dataclass(frozen=True)
class RoundInputs:
    """The inputs of a round besides features and state, on the model's device.

    tokens_RL: int64 ids.
    layout: the rows' layout.
    targets_N: int64 ids of the targets.
    target_index_N: the targets' positions in the flattened [R * L]; None: every position has a target.
    rows_R: the rows' indices in the batch; None: all rows take part.
    source_rows: the rows of the features that the window's previous pass leaves, in the order of its rounds.
    source_index_R: the positions of this round's rows in `source_rows`; None: they are equal, or it is a wake round.
    """

    tokens_RL: torch.Tensor
    layout: DocumentLayout
    targets_N: torch.Tensor
    target_index_N: torch.Tensor | None = None
    rows_R: torch.Tensor | None = None
    source_rows: tuple[int, ...] = ()
    source_index_R: torch.Tensor | None = None


for _kind in (DocumentLayout, RoundInputs):
    register_dataclass(_kind)


def inputs_of_rounds(
    batch: Batch, rounds: Sequence[Round], layouts: RoundLayouts, device: torch.device
) -> list[RoundInputs]:
    """The inputs of each round. batch: on the CPU. rounds: in the order in which they run. layouts: of the batch."""
    inputs = list[RoundInputs]()
    previous, current, at = list[tuple[int, ...]](), list[tuple[int, ...]](), (-1, 0)
    for r in rounds:
        if (r.window, r.pass_index) != at:
            previous, current, at = current, [], (r.window, r.pass_index)
        inputs.append(_round_inputs(batch, layouts.of(r), r, () if r.is_wake else tuple(chain.from_iterable(previous))))
        if not r.state_only:  # such a round leaves no features
            current.append(r.rows)
    return inputs if device.type == "cpu" else _sent(inputs, device)


def _round_inputs(batch: Batch, layout: DocumentLayout, r: Round, source_rows: tuple[int, ...]) -> RoundInputs:
    """Cut a round's tokens and targets out of the batch."""
    all_rows = len(r.rows) == batch.tokens_BT.shape[0]
    rows = torch.tensor(r.rows)

    def cut(t: torch.Tensor) -> torch.Tensor:
        part = t[:, r.start + r.skip : r.stop]
        return part if all_rows else part.index_select(0, rows)

    targets = cut(batch.targets_BT).flatten()
    has_target = targets != IGNORE
    index = None if bool(has_target.all()) else has_target.nonzero().squeeze(1)
    return RoundInputs(
        tokens_RL=cut(batch.tokens_BT),
        layout=layout,
        targets_N=targets if index is None else targets[index],
        target_index_N=index,
        rows_R=None if all_rows else rows,
        source_rows=source_rows,
        source_index_R=row_index(source_rows, r.rows) if source_rows else None,
    )


def row_index(order: Sequence[int], rows: Sequence[int]) -> torch.Tensor | None:
    """The positions (int64, on the CPU) of `rows` in `order`; None if both are equal."""
    if tuple(order) == tuple(rows):
        return None
    position = {row: i for i, row in enumerate(order)}
    return torch.tensor([position[row] for row in rows])


def _sent(inputs: list[RoundInputs], device: torch.device) -> list[RoundInputs]:
    """The inputs on the device, by one copy from pinned memory that the host does not wait for."""
    leaves, structure = tree_flatten(inputs)
    which = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for i, tensor in zip(which, packed([leaves[i] for i in which], device), strict=True):
        leaves[i] = tensor
    return tree_unflatten(leaves, structure)


def packed(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of CPU tensors on the device, contiguous, by one copy of all their bytes."""
    sizes = [-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    parts = buffer.split(sizes)
    for t, part in zip(tensors, parts, strict=True):
        _view(part, t).copy_(t)
    on_device = buffer.to(device, non_blocking=True)
    return [_view(part, t) for t, part in zip(tensors, on_device.split(sizes), strict=True)]


def _view(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first bytes of `part` as a tensor of the shape and dtype of `like`."""
    return part[: like.numel() * like.itemsize].view(like.dtype).view(like.shape)
