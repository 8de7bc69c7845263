"""Rows cut at their resets into segments, which the kernels of a GPU read as sequences of one long row.

The segments are laid end to end. The first segment of a row begins with the row's state, unless the row begins with a
reset; all other segments begin with zeros. The final state of a row's last segment is the row's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

CHUNK = 64  # tokens of a chunk in flash-linear-attention
FEWEST = 8  # stretches to which fewer are padded


class Segments(NamedTuple):
    """The segments of B rows of T tokens, in the order of the flattened rows.

    cu_seqlens: int64 [segments + 1], boundaries in the flattened [B * T].
    row: int64 [segments], the row of each segment.
    continues: bool [segments], True if the segment begins with the row's initial state.
    last_of_row: int64 [B], the last segment of each row.
    chunk_indices: int64 [chunks, 2], the segment of each chunk and the chunk's number in it.
    """

    cu_seqlens: torch.Tensor
    row: torch.Tensor
    continues: torch.Tensor
    last_of_row: torch.Tensor
    chunk_indices: torch.Tensor


def cut_at_resets(reset_BT: torch.Tensor) -> Segments:
    """Cut rows at their resets; the start of a row is a boundary too.

    It reads the resets: on a GPU that waits for all work before, so a step cuts on the CPU, ahead of its rounds.
    """
    batch, num_tokens = reset_BT.shape
    begins = reset_BT.bool().clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * num_tokens])])
    continues = ~reset_BT.bool().flatten()[starts]
    chunks = (cu_seqlens.diff() + CHUNK - 1) // CHUNK
    segment = torch.arange(len(starts), device=starts.device).repeat_interleave(chunks)
    number = torch.arange(len(segment), device=starts.device) - (chunks.cumsum(0) - chunks)[segment]
    return Segments(
        cu_seqlens,
        starts // num_tokens,
        continues,
        begins.sum(1).cumsum(0) - 1,
        torch.stack([segment, number], 1),
    )


def padded_count(stretches: int) -> int:
    """A power of two above this number of stretches of tokens, so that rows with other documents have the same."""
    return max(FEWEST, 1 << stretches.bit_length())


def segments_of_fixed_size(cut: Segments) -> Segments:
    """The segments, and behind them empty ones that begin with zeros, so that sizes hardly depend on the resets.

    Kernels launch as many programs as there are chunks. Here they are as many as the padded number of segments may
    have; those too many belong to the last segment, which is empty, so that they read and write nothing.
    """
    count, num_tokens = len(cut.row), int(cut.cu_seqlens[-1])
    padded = padded_count(count)
    empty, spare = padded - count, num_tokens // CHUNK + padded - len(cut.chunk_indices)
    return Segments(
        repeat_last(cut.cu_seqlens, empty),
        repeat_last(cut.row, empty),
        torch.cat([cut.continues, cut.continues.new_zeros(empty)]),
        cut.last_of_row,
        torch.cat([cut.chunk_indices, cut.chunk_indices.new_tensor([[padded - 1, 0]]).expand(spare, -1)]),
    )


def repeat_last(x_N: torch.Tensor, times: int) -> torch.Tensor:
    """The vector, then its last element `times` times more."""
    return torch.cat([x_N, x_N[-1:].expand(times)])


def segment_states(initial_state: torch.Tensor | None, cut: Segments) -> torch.Tensor | None:
    """[B, ...] -> [segments, ...]: the row's state for segments that continue it, zeros for the others."""
    if initial_state is None:
        return None
    continues = cut.continues.view(-1, *[1] * (initial_state.dim() - 1))
    return torch.where(continues, initial_state.index_select(0, cut.row), 0.0)


def run_on_segments(
    operator: Callable[..., tuple[torch.Tensor, ...]],
    tensors: tuple[torch.Tensor, ...],
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call an operator of sequences on rows [B, T, ...] that are cut at their resets, if there are any.

    operator(*tensors, states, cu_seqlens, chunk_indices) returns (its output, the last states, ...); the states that
    it gets are fp32. segments: `cut_at_resets(reset_BT)`, if it is known. Returns (the output [B, T, ...], the rows'
    last states).
    """
    state = None if initial_state is None else initial_state.float().contiguous()
    if reset_BT is None:
        y, states, *_ = operator(*tensors, state, None, None)
        return y, states
    cut = cut_at_resets(reset_BT) if segments is None else segments
    flat = (x.flatten(0, 1).unsqueeze(0) for x in tensors)
    y, states, *_ = operator(*flat, segment_states(state, cut), cut.cu_seqlens, cut.chunk_indices)
    return y.squeeze(0).unflatten(0, reset_BT.shape), states.index_select(0, cut.last_of_row)
