"""Collectives of tensor ranks with gradients, which torch.compile traces into a block's graph.

megatron-core's mappings reduce in place, warn and ask for the current device, which cannot be traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sleeptrain.distributed.mesh import Axis

_ops = torch.ops._c10d_functional


def _sum(x: torch.Tensor, group: str) -> torch.Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def _gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """The ranks' parts side by side along `dim`."""
    parts = _ops.wait_tensor(_ops.all_gather_into_tensor(x.movedim(dim, 0).contiguous(), size, group))
    return parts.movedim(0, dim).contiguous()


def _sum_part(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """This rank's part along `dim` of the sum over the ranks."""
    total = _ops.wait_tensor(_ops.reduce_scatter_tensor(x.movedim(dim, 0).contiguous(), "sum", size, group))
    return total.movedim(0, dim).contiguous()


def _part(x: torch.Tensor, dim: int, size: int, rank: int) -> torch.Tensor:
    length = x.shape[dim] // size
    return x.narrow(dim, rank * length, length).contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _sum(dy, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return dy, None


class _Gather(torch.autograd.Function):
    """The backward sums the ranks' gradients of each part; with `same_use` they are equal, and a rank keeps its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, rank: int, group: str, same_use: bool) -> torch.Tensor:
        ctx.dim, ctx.size, ctx.rank, ctx.group, ctx.same_use = dim, size, rank, group, same_use
        return _gather(x, dim, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = _part(dy, ctx.dim, ctx.size, ctx.rank) if ctx.same_use else _sum_part(dy, ctx.dim, ctx.size, ctx.group)
        return dx, None, None, None, None, None


class _SumPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return _sum_part(x, dim, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gather(dy, ctx.dim, ctx.size, ctx.group), None, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, rank: int, group: str) -> torch.Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return _part(x, dim, size, rank)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gather(dy, ctx.dim, ctx.size, ctx.group), None, None, None, None


def enter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return x; in the backward its gradient is summed over the ranks."""
    return _Enter.apply(x, axis.name)


def sum_over_ranks(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum over the ranks; the gradient, which is equal on all ranks, passes through."""
    return _Sum.apply(x, axis.name)


def gather_channels(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., C] of this rank -> [..., ranks * C], by rank; the backward sums the ranks' gradients of each part."""
    return _Gather.apply(x, x.dim() - 1, axis.size, axis.rank, axis.name, False)


def split_tokens(x_BTD: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's consecutive part of each row's tokens, [B, T/ranks, D]; the backward gathers the ranks' gradients.

    T must be a multiple of the ranks.
    """
    return _Part.apply(x_BTD, 1, axis.size, axis.rank, axis.name)


def whole_tokens(x_BTD: torch.Tensor, axis: Axis, same_use: bool) -> torch.Tensor:
    """The tokens of all ranks, [B, T, D], from this rank's part of them.

    same_use: all ranks compute the same with the result, so gradients are equal; otherwise they are summed over ranks.
    """
    return _Gather.apply(x_BTD, 1, axis.size, axis.rank, axis.name, same_use)


def sum_tokens(x_BTD: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part of the tokens of the sum over the ranks, [B, T/ranks, D]; the backward gathers the gradients."""
    return _SumPart.apply(x_BTD, 1, axis.size, axis.name)
