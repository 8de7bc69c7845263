"""Norms against those of torch, and the place of the gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.model.norm import GatedRMSNorm, HeadsRMSNorm, RMSNorm, rms_norm
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
