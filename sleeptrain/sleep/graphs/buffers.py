"""Tensors that keep their place in memory: a graph reads and writes the places that it was recorded with."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn


class Slot:
    """Memory of the rounds at one place of a micro-batch, of which each micro-batch runs one at most.

    Rounds of different lengths share it: they never hold activations at the same time.
    pool: of the graphs. window: tokens of a window; a pass has as many or fewer.
    """

    def __init__(self, pool: Any, window: int) -> None:
        self.pool, self._window = pool, window
        self._memory: dict[Hashable, torch.Tensor] = {}

    def buffer(self, role: Hashable, like: torch.Tensor, length: int) -> torch.Tensor:
        """A contiguous tensor of the shape and dtype of `like`, uninitialised, in memory that all passes share.

        role: tensors of one round that live at the same time have different ones. length: tokens of the pass.
        """
        shape = list(like.shape)
        if len(shape) > 1 and shape[1] == length:
            shape[1] = self._window
        key = (role, like.dtype, *shape)
        if key not in self._memory:
            self._memory[key] = torch.empty(shape, dtype=like.dtype, device=like.device).flatten()
        return self._memory[key][: like.numel()].view(like.shape)


class FixedGradients:
    """Keeps the gradients of a model's trained parameters in their place from step to step.

    tensors: the gradient of each, at the same place as long as `begin` returns False.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.tensors: dict[nn.Parameter, torch.Tensor] = {}
        self._places: tuple[tuple[int, int], ...] = ()

    def begin(self) -> bool:
        """Give each parameter without a gradient one of zeros. True if a parameter or a gradient has a new place."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        dropped = [p for p in trained if p.grad is None]
        for p in dropped:
            p.grad = self.tensors[p] if p in self.tensors else torch.empty_like(p, requires_grad=False)
        zero_(p.grad for p in dropped)
        self.tensors = {p: p.grad for p in trained if p.grad is not None}
        places = tuple((p.data_ptr(), g.data_ptr()) for p, g in self.tensors.items())
        moved, self._places = places != self._places, places
        return moved


def zero_(tensors: Iterable[torch.Tensor | None]) -> None:
    """Set tensors to zero, with few kernels."""
    for (same,) in _by_dtype([(t,) for t in tensors if t is not None]):
        torch._foreach_zero_(same)


def copy_(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy values into tensors of the same dtypes, with few kernels."""
    for same, of_them in _by_dtype(list(zip(into, values, strict=True))):
        torch._foreach_copy_(same, of_them)


def _by_dtype(tuples: Sequence[tuple[torch.Tensor, ...]]) -> Iterator[list[list[torch.Tensor]]]:
    """The tuples as lists, one group for each dtype of the first: torch joins copies of one dtype in a kernel."""
    groups: dict[torch.dtype, list[tuple[torch.Tensor, ...]]] = {}
    for tensors in tuples:
        groups.setdefault(tensors[0].dtype, []).append(tensors)
    yield from ([list(column) for column in zip(*group, strict=True)] for group in groups.values())
