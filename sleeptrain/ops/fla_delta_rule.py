"""The gated delta rule of flash-linear-attention, and the norm of its queries and keys, as operators of torch.

torch knows the shapes of an operator's results without a GPU, and torch.compile takes it as one node of a graph. A row
is a sequence; or, with `cu_seqlens`, B is 1 and the row is several sequences, each with its own state (`Segments`).

A forward returns what its backward reads besides the arguments: the intermediate results of the kernels, which have no
gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from sleeptrain.ops.fla_package import from_fla, on_its_device
from sleeptrain.ops.operator import operator
from sleeptrain.ops.segments import CHUNK

RULE, L2NORM = "fla.ops.gated_delta_rule.chunk", "fla.modules.norm.l2norm"


@operator("l2norm")
@on_its_device
def l2norm(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / sqrt(sum of squares + eps) over the last dimension, in x's dtype; the factor, fp32). x: contiguous."""
    return from_fla(L2NORM, "l2norm_fwd")(x, eps)


@l2norm.register_fake
def _(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("l2norm_backward")
@on_its_device
def l2norm_backward(dy: torch.Tensor, y: torch.Tensor, factor: torch.Tensor, eps: float) -> torch.Tensor:
    return from_fla(L2NORM, "l2norm_bwd")(y, factor, dy.contiguous(), eps)


@l2norm_backward.register_fake
def _(dy: torch.Tensor, y: torch.Tensor, factor: torch.Tensor, eps: float) -> torch.Tensor:
    return y.new_empty(y.shape)


def _save_l2norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    y, factor = output
    ctx.eps = inputs[1]
    ctx.save_for_backward(y, factor)
    ctx.mark_non_differentiable(factor)


def _l2norm_gradient(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
    return l2norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


l2norm.register_autograd(_l2norm_gradient, setup_context=_save_l2norm)


@operator("gated_delta_rule")
@on_its_device
def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated delta rule with queries times `scale`, on contiguous tensors.

    q, k: [B, T, H, K], v: [B, T, G, V], all of one dtype; g, beta: [B, T, G] fp32; initial_state: [N, G, K, V] fp32 of
    N sequences. cu_seqlens: int64 [N + 1], chunk_indices: int64 [chunks, 2] (`Segments`), both or none. Returns
    (o [B, T, G, V], final states [N, G, K, V] fp32, the decays' logarithms to base 2 summed in each chunk [B, T, G],
    the chunks' inverses [B, T, G, 64] in k's dtype).
    """
    g_sum, o, A, S, *_ = from_fla(RULE, "chunk_gated_delta_rule_fwd")(
        q, k, v, g, beta, scale, initial_state, True, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices
    )
    return o, S, g_sum, A


@gated_delta_rule.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    A = k.new_empty(*g.shape, CHUNK)
    return v.new_empty(v.shape), empty_states(k, v, cu_seqlens), g.new_empty(g.shape), A


def empty_states(k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Uninitialised states of all sequences, [N, heads of v, K, V] fp32."""
    count = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(count, v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


@operator("gated_delta_rule_backward")
@on_its_device
def gated_delta_rule_backward(
    do: torch.Tensor,
    dS: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g_sum: torch.Tensor,
    beta: torch.Tensor,
    A: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v, g, beta and the initial state (empty without one). dS: None for zeros."""
    dq, dk, dv, dbeta, dg, dS0, *_ = from_fla(RULE, "chunk_gated_delta_rule_bwd")(
        q,
        k,
        v,
        g_sum,
        beta,
        A,
        scale,
        initial_state,
        do.contiguous(),
        None if dS is None else dS.contiguous(),
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return dq, dk, dv, dg, dbeta, g_sum.new_empty(0) if dS0 is None else dS0


@gated_delta_rule_backward.register_fake
def _(
    do: torch.Tensor, dS: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *saved: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g_sum, beta, _, initial_state, *_ = saved
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g_sum, beta))
    return dq, dk, dv, dg, dbeta, empty_gradient(initial_state, g_sum)


def empty_gradient(initial_state: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised gradient of a state in the dtype of `like`; of no elements where there is no state."""
    return like.new_empty(0 if initial_state is None else initial_state.shape)


def _save_rule(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, _, beta, initial_state, cu_seqlens, chunk_indices, ctx.scale = inputs
    g_sum, A = output[2:]
    ctx.save_for_backward(q, k, v, g_sum, beta, A, initial_state, cu_seqlens, chunk_indices)
    ctx.mark_non_differentiable(g_sum, A)
    ctx.set_materialize_grads(False)


def _rule_gradient(
    ctx: Any, do: torch.Tensor | None, dS: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # one look: what is recomputed can be read once
    if do is None:
        do = torch.zeros_like(saved[2])
    *grads, dS0 = gated_delta_rule_backward(do, dS, *saved, ctx.scale)
    return *grads, dS0 if ctx.needs_input_grad[5] else None, None, None, None


gated_delta_rule.register_autograd(_rule_gradient, setup_context=_save_rule)
