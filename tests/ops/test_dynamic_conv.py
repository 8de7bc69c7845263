from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.ops import causal_conv, dynamic_causal_conv
from tests.ops.cases import leaves

EXACT = dict(rtol=1e-12, atol=1e-13)


def token_loop(x, kernel, tail, reset, valid):
    """One row, one token at a time; a token's kernel weighs its taps, whatever kernels the tokens before had."""
    (B, T, D), W = x.shape, kernel.shape[2]
    outputs, tails = [], []
    for b in range(B):
        zeros = [x.new_zeros(D)] * (W - 1)
        taps = list(zeros) if tail is None else list(tail[b])
        carried = list(taps)
        for t in range(T):
            if reset is not None and reset[b, t]:
                taps, carried = list(zeros), list(zeros)
            seen = valid is None or bool(valid[b, t])
            taps = [*taps, x[b, t] if seen else x.new_zeros(D)]
            carried = [*carried, x[b, t]] if seen else carried
            outputs.append(F.silu(sum(taps[len(taps) - W + w] * kernel[b, t, w] for w in range(W))))
        tails += carried[len(carried) - (W - 1) :]
    return torch.stack(outputs).view(B, T, D), (torch.stack(tails) if tails else x.new_zeros(0)).view(B, W - 1, D)


@pytest.mark.parametrize("bits", range(8), ids=lambda bits: f"{bits:03b}")
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (11, 4), (9, 2), (3, 1)])
def test_equals_the_token_loop(T: int, W: int, bits: int) -> None:
    torch.manual_seed(bits)
    x, kernel, tail = (torch.randn(s, dtype=torch.float64) for s in ((3, T, 5), (3, T, W, 5), (3, W - 1, 5)))
    tensors = leaves([x, kernel] + [tail] * (bits & 1))
    reset = torch.rand(3, T) < 0.3 if bits & 2 else None
    valid = torch.rand(3, T) < 0.6 if bits & 4 else None
    state = tensors[2] if bits & 1 else None
    expected = token_loop(tensors[0], tensors[1], state, reset, valid)
    found = dynamic_causal_conv(tensors[0], tensors[1], initial_state=state, reset_BT=reset, valid_BT=valid)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    cotangents = [torch.randn_like(a) for a in found]
    grads = torch.autograd.grad(found, tensors, cotangents)
    linked = [(a, c) for a, c in zip(expected, cotangents, strict=True) if a.requires_grad]
    exact = torch.autograd.grad([a for a, _ in linked], tensors, [c for _, c in linked], allow_unused=True)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **EXACT)


def test_one_kernel_for_all_tokens_is_the_static_convolution() -> None:
    torch.manual_seed(0)
    x, weight, tail = (torch.randn(s, dtype=torch.float64) for s in ((2, 7, 6), (6, 4), (2, 3, 6)))
    reset = torch.rand(2, 7) < 0.3
    kernel = weight.t().expand(2, 7, 4, 6)
    found = dynamic_causal_conv(x, kernel, initial_state=tail, reset_BT=reset)
    for a, b in zip(found, causal_conv(x, weight, initial_state=tail, reset_BT=reset), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_bf16_is_computed_in_fp32() -> None:
    x, kernel = torch.randn(2, 9, 6).bfloat16().requires_grad_(), torch.randn(2, 9, 4, 6).bfloat16().requires_grad_()
    y, tail = dynamic_causal_conv(x, kernel)
    dx, dkernel = torch.autograd.grad(y.float().sum() + tail.sum(), [x, kernel])
    assert [t.dtype for t in (y, tail, dx, dkernel)] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    exact, _ = dynamic_causal_conv(x.detach().double(), kernel.detach().double())
    torch.testing.assert_close(y.double(), exact, rtol=5e-3, atol=1e-3)
