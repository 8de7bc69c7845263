"""The operators around flash-linear-attention as torch sees them: schemas, fake results, gradients in a traced graph.

Inputs are narrow: a fake result in a wrong dtype differs from a real one only then.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sleeptrain.ops import fla_conv, fla_delta_rule, fla_elementwise, fla_linear_attention
from sleeptrain.ops.operator import Operator
from sleeptrain.ops.segments import cut_at_resets, segment_states
from tests.kernels.backends import OWN, Backend, parameters
from tests.kernels.comparison import drawn, leaves_on
from tests.ops.cases import delta_inputs, resets

of_narrow = pytest.mark.parametrize("backend", parameters([b for b in OWN if b.dtype.itemsize == 2]), indirect=True)


def check(operator: Operator, *args: Any) -> None:
    """Fake results have the shapes, dtypes and strides of real ones; a traced graph has an eager call's gradients."""
    torch.library.opcheck(operator.overload, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not leaves:
        return
    torch._dynamo.reset()  # one function of this file is compiled for all operators
    compiled = torch.compile(lambda *args: operator(*args), backend="aot_eager", fullgraph=True)
    found, expected = (
        torch.autograd.grad([y.sum() for y in tree_leaves(run(*args)) if y.requires_grad], leaves, allow_unused=True)
        for run in (compiled, operator)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0 if b is None or not b.is_cuda else 1e-4)


def sequences(backend: Backend, documents: bool) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """(q, k, v, g, beta; states and bounds): two rows, or one row of several documents."""
    leaves = leaves_on(backend, delta_inputs(2, 20, 1, 2, 32, 16), narrow=3)
    if not documents:
        return leaves[:5], [leaves[5], None, None]
    cut = cut_at_resets(resets(2, 20).to(backend.device))
    joined = [x.detach().flatten(0, 1).unsqueeze(0).requires_grad_() for x in leaves[:5]]
    states = segment_states(leaves[5].detach(), cut)
    assert states is not None
    return joined, [states.requires_grad_(), cut.cu_seqlens, cut.chunk_indices]


@of_narrow
@pytest.mark.parametrize("documents", [False, True])
def test_the_gated_delta_rule(backend: Backend, documents: bool) -> None:
    tensors, rest = sequences(backend, documents)
    check(fla_delta_rule.gated_delta_rule, *tensors, *rest, 0.25)


@of_narrow
def test_the_gated_delta_rule_without_a_state(backend: Backend) -> None:
    tensors, _ = sequences(backend, False)
    check(fla_delta_rule.gated_delta_rule, *tensors, None, None, None, 0.25)


@of_narrow
@pytest.mark.parametrize("documents", [False, True])
def test_gated_linear_attention(backend: Backend, documents: bool) -> None:
    (_, _, v, g, _), rest = sequences(backend, documents)
    shape = (*v.shape[:3], 32)
    q, k = (torch.randn(shape).to(v).requires_grad_() for _ in range(2))
    check(fla_linear_attention.gated_linear_attention, q, k, v, g, *rest, 1.0)


@of_narrow
def test_the_norm_of_keys(backend: Backend) -> None:
    check(fla_delta_rule.l2norm, leaves_on(backend, delta_inputs(2, 9, 3, 3, 16, 8), narrow=3)[0], 1e-6)


@of_narrow
@pytest.mark.parametrize("documents", [False, True])
def test_the_short_convolution(backend: Backend, documents: bool) -> None:
    """On a slice of wider rows."""
    wide, weight, bias = leaves_on(backend, drawn((1, 20, 24), (16, 4), (16,)), narrow=1)
    x = wide.detach()[..., 4:20].requires_grad_()
    if not documents:
        check(fla_conv.short_convolution, x, weight, None, None, None, None, True)
        return
    cut = cut_at_resets(resets(1, 20).to(backend.device))
    cache = torch.zeros(len(cut.row), 16, 4, device=backend.device).requires_grad_()
    check(fla_conv.short_convolution, x, weight, bias, cache, cut.cu_seqlens, cut.chunk_indices, True)


@of_narrow
def test_norms_and_swiglu(backend: Backend) -> None:
    x, y, weight = leaves_on(backend, drawn((2, 5, 16), (2, 5, 16), (16,)), narrow=2)
    check(fla_elementwise.rms_norm, x, weight, 1e-6)
    check(fla_elementwise.add_rms_norm, x, y, weight, 1e-6)
    check(fla_elementwise.gated_rms_norm, x, y, weight, 1e-6)
    check(fla_elementwise.swiglu, x, y)
