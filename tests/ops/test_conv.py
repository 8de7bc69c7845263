from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.ops import causal_conv, conv
from tests.ops.cases import leaves


def token_loop(x, weight, bias, tail, reset, valid):
    """One row, one token at a time."""
    (B, T, D), W = x.shape, weight.shape[1]
    outputs, tails = [], []
    for b in range(B):
        zeros = [x.new_zeros(D)] * (W - 1)
        taps = zeros if tail is None else list(tail[b])
        carried = list(taps)
        for t in range(T):
            if reset is not None and reset[b, t]:
                taps, carried = list(zeros), list(zeros)
            seen = valid is None or bool(valid[b, t])
            taps = [*taps, x[b, t] if seen else x.new_zeros(D)]
            carried = [*carried, x[b, t]] if seen else carried
            total = sum(taps[len(taps) - W + w] * weight[:, w] for w in range(W))
            outputs.append(F.silu(total if bias is None else total + bias))
        tails += carried[len(carried) - (W - 1) :]
    return torch.stack(outputs).view(B, T, D), (torch.stack(tails) if tails else x.new_zeros(0)).view(B, W - 1, D)


@pytest.mark.parametrize("bits", range(16), ids=lambda bits: f"{bits:04b}")
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (11, 4), (9, 2), (3, 1)])
def test_equals_the_token_loop(T: int, W: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SLAB_ELEMENTS", 2 * (T + W - 1) * 5)  # the backward takes the rows in two steps
    torch.manual_seed(bits)
    x, weight, bias, tail = (torch.randn(s, dtype=torch.float64) for s in ((3, T, 5), (5, W), (5,), (3, W - 1, 5)))
    tensors = leaves([x, weight] + [bias] * (bits & 1) + [tail] * (bits >> 1 & 1))
    reset = torch.rand(3, T) < 0.3 if bits & 4 else None
    valid = torch.rand(3, T) < 0.6 if bits & 8 else None

    def arrange(tensors):
        rest = list(tensors[2:])
        return tensors[0], tensors[1], rest.pop(0) if bits & 1 else None, rest.pop(0) if bits & 2 else None

    expected = token_loop(*arrange(tensors), reset, valid)
    x, weight, bias, tail = arrange(tensors)
    found = causal_conv(x, weight, bias_D=bias, initial_state=tail, reset_BT=reset, valid_BT=valid)
    with torch.no_grad():
        without_grad = causal_conv(x, weight, bias_D=bias, initial_state=tail, reset_BT=reset, valid_BT=valid)
    for a, b, c in zip(found, expected, without_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(c, b, rtol=1e-12, atol=1e-13)
    cotangents = [torch.randn_like(a) for a in found]
    grads = torch.autograd.grad(found, tensors, cotangents)
    linked = [(a, c) for a, c in zip(expected, cotangents, strict=True) if a.requires_grad]
    exact = torch.autograd.grad([a for a, _ in linked], tensors, [c for _, c in linked], allow_unused=True)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-12, atol=1e-13)


def test_two_halves_with_the_tail_equal_one_call() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 13, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    full, tail = causal_conv(x, weight)
    first, between = causal_conv(x[:, :2], weight)
    second, last = causal_conv(x[:, 2:], weight, initial_state=between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), full, rtol=1e-12, atol=1e-13)
    assert torch.equal(last, tail)


def test_a_window_of_pads_returns_its_initial_tail() -> None:
    tail = torch.randn(2, 3, 6)
    _, returned = causal_conv(
        torch.randn(2, 5, 6), torch.randn(6, 4), initial_state=tail, valid_BT=torch.zeros(2, 5, dtype=torch.bool)
    )
    assert torch.equal(returned, tail)


def test_nothing_crosses_a_reset() -> None:
    torch.manual_seed(0)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, 5] = True
    x, weight, tail = leaves([torch.randn(1, 9, 6), torch.randn(6, 4), torch.randn(1, 3, 6)])
    y, last = causal_conv(x, weight, initial_state=tail, reset_BT=reset)
    dx, dtail = torch.autograd.grad(y[:, 5:].sum() + last.sum(), [x, tail])
    assert not dx[:, :5].any() and not dtail.any()
    other = x.detach().clone()
    other[:, :5] *= 7
    y_other, last_other = causal_conv(other, weight, initial_state=-tail, reset_BT=reset)
    assert torch.equal(y[:, 5:], y_other[:, 5:]) and torch.equal(last, last_other)


def test_bf16_is_computed_in_the_weights_dtype() -> None:
    x = torch.randn(2, 9, 6).bfloat16().requires_grad_()
    weight = torch.randn(6, 4, requires_grad=True)
    y, tail = causal_conv(x, weight)
    dx, dweight = torch.autograd.grad(y.float().sum() + tail.sum(), [x, weight])
    assert [t.dtype for t in (y, tail, dx, dweight)] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    exact, _ = causal_conv(x.detach().double(), weight.detach().double())
    torch.testing.assert_close(y.double(), exact, rtol=5e-3, atol=1e-3)
