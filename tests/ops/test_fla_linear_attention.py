from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops.fla_linear_attention import gated_linear_attention

B, T, H, K, V, N = 1, 150, 4, 16, 8, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [None, N])
@pytest.mark.parametrize("with_state", [True, False])
def test_shapes_are_known_without_the_package(dtype: torch.dtype, sequences: int | None, with_state: bool) -> None:
    with FakeTensorMode():
        count = sequences or B
        states = [torch.empty(count, H, K, V, requires_grad=True)] * with_state
        bounds = [None, None] if sequences is None else [torch.empty(N + 1).long(), torch.empty(5, 2).long()]
        shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H)]
        dtypes = [dtype] * 3 + [torch.float32]
        leaves = [torch.empty(s, dtype=d, requires_grad=True) for s, d in zip(shapes, dtypes, strict=True)]
        o, S, g_sum = gated_linear_attention(*leaves, *(states or [None]), *bounds, 1.0)
        assert (o.shape, o.dtype, S.shape, S.dtype) == ((B, T, H, V), dtype, (count, H, K, V), torch.float32)
        assert (g_sum.shape, g_sum.dtype, g_sum.requires_grad) == ((B, T, H), torch.float32, False)
        for outputs in ([o, S], [o], [S]):
            gradients = torch.autograd.grad([x.sum() for x in outputs], [*leaves, *states], retain_graph=True)
            assert [x.dtype for x in gradients] == [x.dtype for x in [*leaves, *states]]
