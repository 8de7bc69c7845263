"""Mamba-2's recurrence by flash-linear-attention as an operator of torch, in the manner of `fla_delta_rule`."""

from __future__ import annotations

from typing import Any

import torch

from sleeptrain.ops.fla_delta_rule import empty_gradient, empty_states
from sleeptrain.ops.fla_package import from_fla, on_its_device
from sleeptrain.ops.operator import operator
from sleeptrain.ops.segments import CHUNK

GLA, UTILS, CONSTANTS = "fla.ops.simple_gla.chunk", "fla.ops.utils", "fla.ops.utils.constant"


@operator("gated_linear_attention")
@on_its_device
def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, on contiguous tensors.

    q, k: [B, T, H, K], v: [B, T, H, V], all of one dtype; g: [B, T, H] fp32; the other arguments and the results are
    those of `fla_delta_rule.gated_delta_rule`, without inverses.
    """
    bounds = {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices}
    g_sum = from_fla(UTILS, "chunk_local_cumsum")(g, chunk_size=CHUNK, scale=from_fla(CONSTANTS, "RCP_LN2"), **bounds)
    o, S = from_fla(GLA, "chunk_simple_gla_fwd")(
        q, k, v, g_sum, scale=scale, initial_state=initial_state, output_final_state=True, **bounds
    )
    return o, S, g_sum


@gated_linear_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return v.new_empty(v.shape), empty_states(k, v, cu_seqlens), g.new_empty(g.shape)


@operator("gated_linear_attention_backward")
@on_its_device
def gated_linear_attention_backward(
    do: torch.Tensor,
    dS: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g_sum: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v, g and the initial state (empty without one). dS: None for zeros."""
    bounds = {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices}
    dS = None if dS is None else dS.contiguous()
    dq, dk, dv, dg, dS0 = from_fla(GLA, "chunk_simple_gla_bwd")(
        q, k, v, g_sum, None, initial_state, do.contiguous(), dS, scale, **bounds
    )
    dg = from_fla(UTILS, "chunk_local_cumsum")(dg, chunk_size=CHUNK, reverse=True, **bounds)
    return dq, dk, dv, dg, g_sum.new_empty(0) if dS0 is None else dS0


@gated_linear_attention_backward.register_fake
def _(
    do: torch.Tensor, dS: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *saved: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g_sum, initial_state, *_ = saved
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g_sum))
    return dq, dk, dv, dg, empty_gradient(initial_state, g_sum)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, _, initial_state, cu_seqlens, chunk_indices, ctx.scale = inputs
    g_sum = output[2]
    ctx.save_for_backward(q, k, v, g_sum, initial_state, cu_seqlens, chunk_indices)
    ctx.mark_non_differentiable(g_sum)
    ctx.set_materialize_grads(False)


def _attention_gradient(
    ctx: Any, do: torch.Tensor | None, dS: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    if do is None:
        do = torch.zeros_like(ctx.saved_tensors[2])
    *grads, dS0 = gated_linear_attention_backward(do, dS, *ctx.saved_tensors, ctx.scale)
    return *grads, dS0 if ctx.needs_input_grad[4] else None, None, None, None


gated_linear_attention.register_autograd(_attention_gradient, setup_context=_save_attention)
