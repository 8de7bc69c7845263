"""Mamba-2's recurrence by flash-linear-attention as an operator of torch, in the manner of `fla_delta_rule`."""

from __future__ import annotations

from typing import Any

import torch

from sleeptrain.ops.fla_delta_rule import empty_gradient, empty_states
from sleeptrain.ops.fla_package import from_fla, on_its_device
from sleeptrain.ops.fla_states import backward_states, forward_states
from sleeptrain.ops.operator import operator
from sleeptrain.ops.segments import CHUNK

OUTPUT, UTILS, CONSTANTS = "fla.ops.common.chunk_o", "fla.ops.utils", "fla.ops.utils.constant"


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
    h, S = forward_states(k, v, g_sum, initial_state, cu_seqlens, chunk_indices, dtype=k.dtype, final=True)
    assert S is not None
    o = from_fla(OUTPUT, "chunk_fwd_o")(q=q, k=k, v=v, h=h, g=g_sum, scale=scale, chunk_size=CHUNK, **bounds)
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
    do, dS = do.contiguous(), None if dS is None else dS.contiguous()
    bounded = (cu_seqlens, chunk_indices)
    h, _ = forward_states(k, v, g_sum, initial_state, *bounded, dtype=torch.float32, final=False)
    dh, dS0 = backward_states(q, do, g_sum, initial_state, dS, scale, *bounded)
    shared = {"q": q, "k": k, "g": g_sum, "do": do, "dh": dh, "scale": scale, "chunk_size": CHUNK, **bounds}
    dq, dk, _, dg = from_fla(OUTPUT, "chunk_bwd_dqkwg")(v=v, h=h, **shared)
    dv = from_fla(OUTPUT, "chunk_bwd_dv")(**shared)
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
    saved = ctx.saved_tensors  # one look: what is recomputed can be read once
    if do is None:
        do = torch.zeros_like(saved[2])
    *grads, dS0 = gated_linear_attention_backward(do, dS, *saved, ctx.scale)
    return *grads, dS0 if ctx.needs_input_grad[4] else None, None, None, None


gated_linear_attention.register_autograd(_attention_gradient, setup_context=_save_attention)
