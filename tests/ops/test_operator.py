"""Operators of torch that are called without detours, and their gradients inside and outside compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops.operator import OPERATORS, Operator, operator


def _double(x: torch.Tensor, factor: float) -> torch.Tensor:
    return 2.0 * factor * x


@pytest.fixture(scope="module")
def doubled() -> Iterator[Operator]:
    """2 * factor * x with a gradient that is ten times too large, so that its origin shows."""
    made = operator("test_doubled")(_double)
    made.register_fake(lambda x, factor: x.new_empty(x.shape))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.factor = inputs[1]

    made.register_autograd(lambda ctx, dy: (20.0 * ctx.factor * dy, None), setup_context=setup)
    yield made
    del OPERATORS["test_doubled"]


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients(doubled: Operator, compiled: bool) -> None:
    run = torch.compile(lambda x: doubled(x, 1.5), backend="aot_eager", fullgraph=True) if compiled else doubled
    x = torch.arange(3.0).requires_grad_()
    y = run(x) if compiled else run(x, 1.5)
    assert torch.equal(y, 3.0 * x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 30.0))


def test_its_fake_results_need_no_kernel(doubled: Operator) -> None:
    with FakeTensorMode() as mode:
        y = doubled(mode.from_tensor(torch.zeros(3, 4)), 1.5)
    assert y.shape == (3, 4)
    assert OPERATORS["test_doubled"] is doubled and doubled.fake is not None


def test_compiled_code_calls_the_operator_alone(doubled: Operator) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.arange(3.0).requires_grad_()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(lambda x: doubled(x, 1.5), backend=backend, fullgraph=True)(x).sum().backward()
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [doubled.overload]
