"""The operators under fake tensors: what shapes, dtypes and gradients torch knows without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops.fla_delta_rule import gated_delta_rule, l2norm

B, T, H, G, K, V, N = 1, 150, 2, 4, 16, 8, 3


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, G, V), (B, T, G), (B, T, G)]
    dtypes = [dtype] * 3 + [torch.float32] * 2
    return [torch.empty(s, dtype=d, requires_grad=True) for s, d in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [None, N])
@pytest.mark.parametrize("with_state", [True, False])
def test_shapes_are_known_without_the_package(dtype: torch.dtype, sequences: int | None, with_state: bool) -> None:
    with FakeTensorMode():
        count = sequences or B
        states = [torch.empty(count, G, K, V, requires_grad=True)] * with_state
        bounds = [None, None] if sequences is None else [torch.empty(N + 1).long(), torch.empty(5, 2).long()]
        leaves = inputs(dtype)
        o, S, g_sum, A = gated_delta_rule(*leaves, *(states or [None]), *bounds, 0.25)
        assert (o.shape, o.dtype) == ((B, T, G, V), dtype)
        assert (S.shape, S.dtype) == ((count, G, K, V), torch.float32)
        assert (g_sum.shape, g_sum.dtype, A.shape, A.dtype) == ((B, T, G), torch.float32, (B, T, G, 64), dtype)
        assert (o.requires_grad, S.requires_grad, g_sum.requires_grad, A.requires_grad) == (True, True, False, False)
        for outputs in ([o, S], [o], [S]):
            gradients = torch.autograd.grad([x.sum() for x in outputs], [*leaves, *states], retain_graph=True)
            assert [x.dtype for x in gradients] == [x.dtype for x in [*leaves, *states]]


def test_a_state_that_is_not_trained_gets_no_gradient() -> None:
    with FakeTensorMode():
        o, S, *_ = gated_delta_rule(*inputs(torch.float32), torch.empty(B, G, K, V), None, None, 0.25)
        (o.sum() + S.sum()).backward()


def test_the_norm_keeps_the_dtype_and_saves_its_result() -> None:
    with FakeTensorMode():
        x = torch.empty(B, T, H, K, dtype=torch.bfloat16, requires_grad=True)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y, factor = l2norm(x, 1e-6)
        assert (y.shape, y.dtype, factor.shape, factor.dtype) == (x.shape, x.dtype, (B, T, H), torch.float32)
        assert [t.shape for t in kept] == [y.shape, factor.shape]
        assert not factor.requires_grad
        assert torch.autograd.grad(y.sum(), x)[0].dtype == x.dtype
