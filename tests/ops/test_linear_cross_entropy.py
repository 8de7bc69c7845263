"""The loss from some rows of logits at a time, against torch's cross entropy of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.linear_cross_entropy import linear_cross_entropy

N, V, D = 11, 23, 6


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, targets, and the gradients of the losses, which differ."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, D, generator=draw, dtype=torch.float64).to(dtype) for size in (N, V))
    targets = torch.randint(V, (N,), generator=draw)
    return x, weight, targets, torch.randn(N, generator=draw, dtype=torch.float64).to(dtype)


def outcome(rows: int, keep: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    x, weight, targets, dlosses = inputs(dtype)
    x.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(x, weight, targets, rows=rows, keep=keep)
    return [losses.detach(), *torch.autograd.grad(losses, (x, weight), dlosses)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [1, 4, N, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_it_equals_the_cross_entropy_of_whole_logits(
    rows: int, keep: bool, dtype: torch.dtype, tolerance: float
) -> None:
    x, weight, targets, dlosses = inputs()
    x.requires_grad_(), weight.requires_grad_()
    losses = F.cross_entropy(x @ weight.t(), targets, reduction="none")
    wanted = [losses.detach(), *torch.autograd.grad(losses, (x, weight), dlosses)]
    for found, exact in zip(outcome(rows, keep, dtype), wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("keep", [True, False])
def test_the_gradient_of_the_weight_adds_up_in_fp32(keep: bool) -> None:
    """In bf16 with a copy of the weight: the sum over many parts is as near to fp64 as that of one part."""
    x, weight, targets, _ = inputs()
    exact = x.float().requires_grad_(), weight.float().requires_grad_()
    F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum").backward()
    errors = {}
    for rows in (1, 64):
        narrow, master = x.bfloat16().requires_grad_(), weight.float().requires_grad_()
        losses = linear_cross_entropy(narrow, master, targets, copy_VD=weight.bfloat16(), rows=rows, keep=keep)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16
        assert master.grad is not None and master.grad.dtype == torch.float32
        errors[rows] = float((master.grad - exact[1].grad).norm() / exact[1].grad.norm())
    assert errors[1] < 1.2 * errors[64] < 0.02


@pytest.mark.parametrize("needed", ["x", "weight"])
@pytest.mark.parametrize("keep", [True, False])
def test_one_gradient_alone_and_twice(needed: str, keep: bool) -> None:
    x, weight, targets, dlosses = inputs()
    leaf = (x if needed == "x" else weight).requires_grad_()
    losses = linear_cross_entropy(x, weight, targets, rows=4, keep=keep)
    [first] = torch.autograd.grad(losses, leaf, dlosses, retain_graph=True)
    [second] = torch.autograd.grad(losses, leaf, dlosses)
    assert torch.equal(first, second) and torch.equal(first, outcome(4, keep)[1 if needed == "x" else 2])


class Products(TorchDispatchMode):
    """Counts products by their operands' dtypes, and the most elements that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, torch.dtype]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.sleeptrain.add_wide_products):
            mats = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg])]
            mats = [t for t in mats if isinstance(t, torch.Tensor)][-2:]
            self.products.append((mats[0].dtype, mats[1].dtype))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("keep", "products"), [(True, 3), (False, 4)])
def test_on_a_gpu_all_products_are_narrow(keep: bool, products: int) -> None:
    """The forward and the two gradients, and the logits once more unless they are kept."""
    num_rows, parts = 64, 4
    with FakeTensorMode(), as_on_gpu(), Products() as seen:
        x = torch.zeros(num_rows, D, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.zeros(V, D, requires_grad=True), torch.zeros(num_rows, dtype=torch.long)
        losses = linear_cross_entropy(x, weight, targets, copy_VD=weight.detach().bfloat16(), rows=16, keep=keep)
        losses.sum().backward()
        assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert seen.products == [(torch.bfloat16, torch.bfloat16)] * products * parts
    assert seen.largest < num_rows * V
