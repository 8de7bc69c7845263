"""Products that are added to a tensor: values and memory, and compiled code that adds without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable

from sleeptrain.ops import add_product as module
from sleeptrain.ops.add_product import add_product
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.plan.roofline.record import Recorder

BF16, FP32 = torch.bfloat16, torch.float32


def factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 16).to(dtype), torch.randn(16, 7).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
def test_it_adds_in_the_memory_of_the_total(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, FP32)
    (a, b), total = factors(dtype), torch.ones(5, 7, dtype=wide)
    found = add_product(total, a, b, wide)
    assert found is total
    torch.testing.assert_close(total, 1 + (a @ b).to(wide))
    torch.testing.assert_close(add_product(None, a, b, wide), (a @ b).to(wide))


def test_on_a_gpu_one_kernel_multiplies_and_adds() -> None:
    with FakeTensorMode(), as_on_gpu(), Recorder() as recorder:
        a, b = torch.empty(5, 16, dtype=BF16), torch.empty(16, 7, dtype=BF16)
        total = torch.empty(5, 7)
        assert add_product(total, a, b, FP32) is total
    [call] = recorder.calls
    assert call.flops == 2 * 5 * 16 * 7
    assert sum(u.bytes for u in call.reads) == 4 * 5 * 7 + 2 * 16 * (5 + 7) and [u.bytes for u in call.writes] == [140]


@contextmanager
def kernel_on_a_cpu() -> Iterator[list[int]]:
    """Let the operator's own code add in fp32; yields the addresses of the totals that it was called with."""
    addresses: list[int] = []

    def add(totals: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], b: torch.Tensor) -> None:
        for total, a in zip(totals, factors, strict=True):
            addresses.append(total.data_ptr())
            total.add_(a.float() @ b.float())

    with torch.library._scoped_library("sleeptrain", "FRAGMENT") as library:
        library.impl("add_wide_products", add, "CPU")
        yield addresses


class Uses(torch.autograd.Function):
    """x @ w^T, whose backward adds the gradient of w to `total`."""

    @staticmethod
    def forward(ctx, x, w, total):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        ctx.total = total
        return x @ w.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        module._add_wide_products([ctx.total], [dy.t()], x)
        return dy @ w, None, None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_adds_to_the_tensor_itself(backend: str) -> None:
    """Each of several uses, whose code is one, adds to the memory that the caller keeps."""
    torch._dynamo.reset()
    x, w = torch.randn(3, 4, dtype=BF16).requires_grad_(), torch.randn(4, 4, dtype=BF16)
    total = torch.zeros(4, 4)
    run = torch.compile(lambda x: torch.tanh(Uses.apply(x, w, total)), backend=backend, fullgraph=True)
    with kernel_on_a_cpu() as addresses:
        run(run(run(x))).sum().backward()
    assert len(addresses) == 3
    expected = torch.zeros(4, 4)
    y = x.detach().clone().requires_grad_()
    with kernel_on_a_cpu():
        z = y
        for _ in range(3):
            z = torch.tanh(Uses.apply(z, w, expected))
        z.sum().backward()
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=2e-2)
    if backend == "inductor":
        assert set(addresses) == {total.data_ptr()}, "no copy is made and copied back"


def test_the_graph_of_the_backward_has_the_operator() -> None:
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    x, w, total = torch.randn(3, 4, dtype=BF16).requires_grad_(), torch.randn(4, 4, dtype=BF16), torch.zeros(4, 4)
    compiled = torch.compile(
        lambda x: Uses.apply(x, w, total), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True
    )
    with kernel_on_a_cpu():
        compiled(x).sum().backward()
    assert "add_wide_products" not in graphs[0] and "add_wide_products" in graphs[1]
