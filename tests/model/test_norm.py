"""Norms against those of torch, and the place of the gate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.model.norm import GatedRMSNorm, HeadsRMSNorm, RMSNorm, rms_norm, sum_and_norm
from sleeptrain.ops.device import as_on_gpu


@pytest.mark.parametrize("kind", ["zero_centred", "plain"])
def test_a_fresh_norm_scales_by_one(kind: str) -> None:
    x, norm = torch.randn(3, 8), RMSNorm(8, 1e-6, kind)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), eps=1e-6))
    norm.weight.data += 0.5
    torch.testing.assert_close(norm(x), 1.5 * F.rms_norm(x, (8,), eps=1e-6))


def test_one_norm_spans_all_heads() -> None:
    x = torch.randn(2, 5, 3, 4)
    expected = F.rms_norm(x.flatten(-2), (12,), eps=1e-6).view_as(x)
    torch.testing.assert_close(HeadsRMSNorm(12, 1e-6)(x), expected)


def test_narrow_inputs_are_normed_in_fp32() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # the sum of the squares is beyond fp16
    y = rms_norm(x, torch.ones(64), 1e-6)
    assert y.dtype == torch.float16 and bool((y == 1).all())


@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 8)])
def test_rms_norm_equals_torchs(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    weight.requires_grad_()
    ours, theirs = rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    a = torch.autograd.grad((ours * direction).sum(), (x, weight))
    b = torch.autograd.grad((theirs * direction).sum(), (x, weight))
    torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))


def test_gate_before_or_after_the_norm():
    x, gate = torch.randn(4, 8), torch.randn(4, 8)
    for first in (True, False):
        norm = GatedRMSNorm(8, 1e-6, gate_first=first)
        expected = F.rms_norm(x * F.silu(gate), (8,)) if first else F.rms_norm(x, (8,)) * F.silu(gate)
        torch.testing.assert_close(norm(x, gate), expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_norm_needs_no_kernel():
    with as_on_gpu():
        assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
        assert GatedRMSNorm(8, 1e-6, gate_first=False)(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)


@contextmanager
def kernels_on_a_cpu() -> Iterator[None]:
    """PyTorch in place of the kernels of RMSNorm."""

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float):
        factor = torch.rsqrt(x.square().mean(-1) + eps)
        return x * factor.unsqueeze(-1) * weight, factor

    def backward(dy, x, weight, factor, beside):
        unit, inner = x * factor.unsqueeze(-1), dy * weight
        dx = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * factor.unsqueeze(-1)
        return dx if beside is None else dx + beside, (dy * unit).flatten(0, -2).sum(0)

    with torch.library._scoped_library("sleeptrain", "FRAGMENT") as library, as_on_gpu():
        library.impl("rms_norm", norm, "CPU")
        library.impl("add_rms_norm", lambda x, y, weight, eps: (x + y, *norm(x + y, weight, eps)), "CPU")
        library.impl("rms_norm_backward", backward, "CPU")
        yield


@pytest.mark.parametrize("read", ["both", "sum", "norm"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_sum_and_its_norm_on_a_gpu(read: str, adds: bool, compiled: bool) -> None:
    """One operator forward and one backward give the values and gradients of a sum and a norm."""
    torch.manual_seed(0)
    norm = RMSNorm(8, 1e-6)
    norm.weight.data.normal_()
    leaves = [*(torch.randn(2, 3, 8, requires_grad=True) for _ in range(1 + adds)), norm.weight]

    def outcome(run) -> list[torch.Tensor | None]:
        total, normed = run(norm, *leaves[:-1])
        wanted = {"both": (total.square() + normed.sin()), "sum": total.square(), "norm": normed.sin()}[read].sum()
        return [total, normed, *torch.autograd.grad(wanted, leaves, allow_unused=True)]

    expected = outcome(sum_and_norm)
    with kernels_on_a_cpu():
        torch._dynamo.reset()
        fused = torch.compile(sum_and_norm, backend="aot_eager", fullgraph=True) if compiled else sum_and_norm
        found = outcome(fused)
    for a, b in zip(found, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-5)


def test_a_norm_with_a_hook_is_called() -> None:
    norm, called = RMSNorm(8, 1e-6), []
    norm.register_forward_pre_hook(lambda *_: called.append(1))
    with kernels_on_a_cpu():
        sum_and_norm(norm, torch.randn(2, 8), torch.randn(2, 8))
    assert called
