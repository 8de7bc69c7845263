"""Each collective of two ranks against the same on whole tensors: values, gradients, and contiguous results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.parallel.tensor.collectives import (
    enter,
    gather_channels,
    split_tokens,
    sum_over_ranks,
    sum_tokens,
    whole_tokens,
)
from tests.parallel.processes import run_ranks

Collective = Callable[[torch.Tensor, Axis], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
Tensors = list[torch.Tensor]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = [normal(rank, 2, 4, 6) for rank in range(2)]


def upstream(rank: int, shape: torch.Size) -> torch.Tensor:
    return normal(10 + rank, *shape)


def _results(collective: Collective, compiled: bool) -> Pair:
    axis = Mesh.build(2, 1).tensor
    x = X[axis.rank].clone().requires_grad_()
    run = torch.compile(collective, backend="aot_eager", fullgraph=True) if compiled else collective
    y = run(x, axis)
    assert y.is_contiguous(), "what reads it would round differently"
    y.backward(upstream(axis.rank, y.shape))
    assert x.grad is not None
    return y.detach(), x.grad


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] + parts[1]


# name: (the collective, its results on rank 0 and 1, and the gradients from those of the results)
CASES: dict[
    str, tuple[Collective, Callable[[], list[torch.Tensor]], Callable[[list[torch.Tensor]], list[torch.Tensor]]]
]
CASES = {
    "enter": (enter, lambda: X, lambda d: [summed(d)] * 2),
    "sum": (sum_over_ranks, lambda: [summed(X)] * 2, lambda d: d),
    "gather channels": (gather_channels, lambda: [torch.cat(X, -1)] * 2, lambda d: list(summed(d).split(6, -1))),
    "split tokens": (
        split_tokens,
        lambda: [X[0][:, :2], X[1][:, 2:]],
        lambda d: [torch.cat(d, 1)] * 2,
    ),
    "whole tokens": (
        lambda x, axis: whole_tokens(x, axis, same_use=False),
        lambda: [torch.cat(X, 1)] * 2,
        lambda d: list(summed(d).split(4, 1)),
    ),
    "whole tokens of one use": (
        lambda x, axis: whole_tokens(x, axis, same_use=True),
        lambda: [torch.cat(X, 1)] * 2,
        lambda d: [d[0][:, :4], d[1][:, 4:]],
    ),
    "sum tokens": (sum_tokens, lambda: list(summed(X).split(2, 1)), lambda d: [torch.cat(d, 1)] * 2),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_same_on_whole_tensors(name: str, compiled: bool) -> None:
    collective, values, gradients = CASES[name]
    found, expected = run_ranks(_results, 2, collective, compiled), values()
    wanted = gradients([upstream(rank, y.shape) for rank, y in enumerate(expected)])
    for (y, dx), value, gradient in zip(found, expected, wanted, strict=True):
        assert torch.equal(y, value)
        torch.testing.assert_close(dx, gradient, rtol=0.0, atol=1e-14)
