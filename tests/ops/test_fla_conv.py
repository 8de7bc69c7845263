from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops import causal_conv, fla_conv
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.ops.segments import cut_at_resets
from tests.ops.cases import leaves, outcome, per_sequence, resets, worst


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_cache", [False, True])
def test_shapes_are_known_without_the_package(documents: bool, with_bias: bool, with_cache: bool) -> None:
    with FakeTensorMode():
        count = 3 if documents else 1
        x = torch.empty(1, 20, 12, dtype=torch.bfloat16)[..., 2:8].requires_grad_()
        weight, bias, cache = (torch.empty(s, requires_grad=True) for s in ((6, 4), (6,), (count, 6, 4)))
        bounds = [torch.empty(4).long(), torch.empty(3, 2).long()] if documents else [None, None]
        y, after = fla_conv.short_convolution(
            x, weight, bias if with_bias else None, cache if with_cache else None, *bounds, True
        )
        assert (y.shape, y.dtype, y.is_contiguous()) == ((1, 20, 6), torch.bfloat16, True)
        assert (after.shape, after.dtype) == ((count, 6, 4), torch.bfloat16)
        inputs = [x, weight, *[bias] * with_bias, *[cache] * with_cache]
        for outputs in ([y, after], [y], [after]):
            gradients = torch.autograd.grad([t.sum() for t in outputs], inputs, retain_graph=True)
            assert [t.dtype for t in gradients] == [t.dtype for t in inputs]
        y, after = fla_conv.short_convolution(x, weight, None, None, *bounds, False)
        assert after.shape == (count, 0) and [g.shape for g in torch.autograd.grad(y.sum(), [x, weight])]


def test_only_its_arguments_are_saved() -> None:
    kept: list[torch.Tensor] = []
    with FakeTensorMode(), as_on_gpu():
        x, weight = torch.empty(2, 9, 6, requires_grad=True), torch.empty(6, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            causal_conv(x, weight)
        assert [t.shape for t in kept] == [x.shape, weight.shape]


def test_a_single_tap_stays_in_pytorch() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 1)
    with as_on_gpu():
        y, tail = causal_conv(x, weight)
    assert torch.equal(y, torch.nn.functional.silu(x * weight[:, 0]))
    assert tail.shape == (2, 0, 3)


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("with_pads", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (11, 4), (9, 2)])
def test_what_surrounds_the_operator(
    monkeypatch: pytest.MonkeyPatch, T: int, W: int, with_resets: bool, with_pads: bool, with_tail: bool
) -> None:
    """The operator is a convolution in PyTorch, with the kernel's cache; rows, tails and pads are around it."""

    def of_one(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, cache: torch.Tensor | None):
        tail = None if cache is None else cache[..., 1:].transpose(1, 2)
        y, tail = causal_conv(x, weight, bias_D=bias, initial_state=tail)
        return y, torch.nn.functional.pad(tail.transpose(1, 2), (1, 0))

    def operator(x, weight, bias, cache, cu_seqlens, chunks, returns_cache):
        run = per_sequence(lambda x, cache: of_one(x, weight, bias, cache))
        return run(x, cache, cu_seqlens, chunks)

    monkeypatch.setattr(fla_conv, "short_convolution", operator)
    torch.manual_seed(0)
    tensors = leaves([torch.randn(s) for s in ((3, T, 5), (5, W), (5,), (3, W - 1, 5))])[: 4 if with_tail else 3]
    reset = resets(3, T, seed=1) if with_resets else None
    valid = torch.rand(3, T) < 0.6 if with_pads else None

    def around(x, weight, bias, tail=None):
        segments = None if reset is None else cut_at_resets(reset)
        masks = {"reset_BT": reset, "valid_BT": valid, "segments": segments}
        return fla_conv.causal_conv(x, weight, bias_D=bias, initial_state=tail, **masks)

    def plain(x, weight, bias, tail=None):
        return causal_conv(x, weight, bias_D=bias, initial_state=tail, reset_BT=reset, valid_BT=valid)

    assert worst(outcome(around, tensors), outcome(plain, tensors)) < 1e-5
    x, weight, bias = tensors[:3]
    masks = {"reset_BT": reset, "valid_BT": valid}
    y, tail = fla_conv.causal_conv(x, weight, bias_D=bias, initial_state=None, **masks, needs_tail=False)
    assert tail is None and torch.allclose(y, plain(*tensors[:3])[0], atol=1e-5)
