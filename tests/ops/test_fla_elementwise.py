from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops.fla_elementwise import gated_rms_norm, rms_norm, swiglu

SHAPE = (2, 5, 3, 8)


def narrow() -> torch.Tensor:
    return torch.empty(SHAPE, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_keeps_the_dtype_and_saves_no_wide_copy(gated: bool) -> None:
    kept: list[torch.Tensor] = []
    with FakeTensorMode():
        inputs = [*(narrow() for _ in range(1 + gated)), torch.empty(8, requires_grad=True)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y, factor = (gated_rms_norm if gated else rms_norm)(*inputs, 1e-6)
        assert (y.shape, y.dtype, y.is_contiguous()) == (SHAPE, torch.bfloat16, True)
        assert (factor.shape, factor.dtype, factor.requires_grad) == (SHAPE[:-1], torch.float32, False)
        assert [(t.shape, t.dtype) for t in kept] == [(t.shape, t.dtype) for t in [*inputs, factor]]
        gradients = torch.autograd.grad(y.sum(), inputs)
        assert [(t.shape, t.dtype) for t in gradients] == [(t.shape, t.dtype) for t in inputs]


def test_swiglu_saves_its_two_arguments() -> None:
    kept: list[torch.Tensor] = []
    with FakeTensorMode():
        inputs = [narrow(), narrow()]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = swiglu(*inputs)
        assert (y.shape, y.dtype) == (SHAPE, torch.bfloat16)
        assert [(t.shape, t.dtype) for t in kept] == [(t.shape, t.dtype) for t in inputs]
        assert [t.shape for t in torch.autograd.grad(y.sum(), inputs)] == [SHAPE, SHAPE]
