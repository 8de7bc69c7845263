"""One function of tensors as two graphs, on a CPU by running it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sleeptrain.ops.row_stacks import RecordedRows
from sleeptrain.sleep.graphs.buffers import Slot
from sleeptrain.sleep.graphs.recorded_round import RecordedRound, distinct
from tests.sleep.graphs.recorder import Recorder

LENGTH = 3


class Layer:
    """Some results of x [2, 3, 4] and s [2, 4]: a new tensor twice, a passed-on input, a constant, and integers."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.linspace(0.1, 1.6, 16, dtype=torch.float64).view(4, 4))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        x, s, name, ids, s_again = leaves
        y = torch.tanh(x @ self.weight) * (s + s_again)[:, None]
        return [y, s, y, name, ids + 1, y.sum(1) + x.sum(1)]


def inputs(seed: int, trained: bool = True) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    x, s = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((2, LENGTH, 4), (2, 4)))
    s.requires_grad_(trained)
    return [x.requires_grad_(trained), s, "name", torch.tensor([[seed]]), s]


def recorded(layer: Layer, trained: bool = True) -> tuple[RecordedRound, dict[nn.Parameter, torch.Tensor], Recorder]:
    recorder, gradients = Recorder(), {p: torch.zeros_like(p) for p in (layer.weight, layer.unused)}
    slot = Slot(recorder.new_pool(), 8)
    recorded = RecordedRound(layer, inputs(0, trained), slot, LENGTH, recorder, gradients, RecordedRows(None))
    return recorded, gradients, recorder


def losses(results: list[Any]) -> torch.Tensor:
    y, s, again, _, _, z = results
    return (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum() + (again**2).sum() + s.sum() + z.sin().sum()


@pytest.mark.parametrize("trained", [True, False])
def test_replays_equal_calls(trained: bool) -> None:
    layer = Layer()
    replayed, gradients, recorder = recorded(layer, trained)
    assert not any(g.any() for g in gradients.values()), "to record adds nothing"
    for seed in (1, 2):
        leaves, plain = inputs(seed, trained), inputs(seed, trained)
        results, expected = replayed(leaves), layer(plain)
        assert results[0] is results[2] and results[1] is leaves[1] and results[3] == "name"
        assert torch.equal(results[4], expected[4]) and not results[4].requires_grad
        for found, value in zip(results, expected, strict=True):
            assert not isinstance(value, torch.Tensor) or torch.equal(found, value)
        losses(results).backward()
        losses(expected).backward()
        for found, value in zip(leaves[:2], plain[:2], strict=True):
            assert trained == (found.grad is not None)
            torch.testing.assert_close(found.grad, value.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[layer.weight], layer.weight.grad, rtol=1e-12, atol=1e-12)
    assert not gradients[layer.unused].any()
    assert (recorder.recorded, recorder.replays) == (2, 4)


def test_a_result_without_a_gradient_counts_as_zeros() -> None:
    layer = Layer()
    replayed, gradients, _ = recorded(layer)
    losses(replayed(inputs(1))).backward()
    before = gradients[layer.weight].clone()
    leaves, plain = inputs(2), inputs(2)
    replayed(leaves)[5].sum().backward()
    layer(plain)[5].sum().backward()
    torch.testing.assert_close(leaves[0].grad, plain[0].grad)
    torch.testing.assert_close(gradients[layer.weight] - before, layer.weight.grad)


def test_what_is_not_copied_to_its_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A break of the code on purpose: the results are those of the inputs at the recording."""
    layer = Layer()
    replayed, _, _ = recorded(layer)
    monkeypatch.setattr(replayed, "fill", lambda inputs: None)
    found = replayed(inputs(1))[0]
    assert torch.equal(found, layer(inputs(0))[0]) and not torch.allclose(found, layer(inputs(1))[0])


def test_distinct_tensors() -> None:
    a, b = torch.ones(1), torch.ones(1)
    tensors, numbers = distinct([a, 3, b, None, a])
    assert [t is u for t, u in zip(tensors, (a, b), strict=True)] == [True, True] and numbers == [0, None, 1, None, 0]
