"""The short convolution by flash-linear-attention's Triton kernels, as an operator of torch with its gradients.

The kernels' cache [N, D, W] has one slot more than our tail [B, W-1, D]: slot 0, which no tap reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sleeptrain.ops.documents import Documents, document_facts
from sleeptrain.ops.fla_package import from_fla, on_its_device
from sleeptrain.ops.operator import operator
from sleeptrain.ops.segments import Segments, run_on_segments

CONV = "fla.modules.causal_conv1d"


def causal_conv(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    *,
    bias_D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    valid_BT: torch.Tensor | None,
    segments: Segments | None = None,
    needs_tail: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sleeptrain.ops.causal_conv` on a GPU, for two taps or more. segments: `cut_at_resets(reset_BT)`, if known.

    Sums are fp32. The backward computes what SiLU read again and rounds it to x's dtype. Raises ConfigError if
    flash-linear-attention is missing.
    """
    reach, wide = weight_DW.shape[1] - 1, torch.promote_types(x_BTD.dtype, weight_DW.dtype)
    if valid_BT is not None:
        x_BTD = torch.where(valid_BT.unsqueeze(-1), x_BTD, 0.0)
    cache = None if initial_state is None else F.pad(initial_state.transpose(1, 2), (1, 0))

    def run(x: torch.Tensor, *rest: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return short_convolution(x, weight_DW, bias_D, *rest, needs_tail and valid_BT is None)

    y, cache = run_on_segments(run, (x_BTD,), cache, reset_BT, segments)
    if not needs_tail:
        return y, None
    if valid_BT is None:
        return y, cache[..., 1:].transpose(1, 2).to(wide)
    documents = document_facts(x_BTD.shape[1], reach, reset_BT, valid_BT)
    return y, _tail_of_valid(x_BTD, initial_state, documents, reach).to(wide)


def _tail_of_valid(
    x_BTD: torch.Tensor, initial_state: torch.Tensor | None, documents: Documents, reach: int
) -> torch.Tensor:
    """The tail where there are pads, which the kernels do not know: gathered from x and the tail before."""
    assert documents.slot_BW is not None and documents.present_BW1 is not None
    slot = documents.slot_BW.unsqueeze(-1).expand(-1, -1, x_BTD.shape[2])
    tail = x_BTD.gather(1, (slot - reach).clamp_min(0))
    before = 0.0 if initial_state is None else initial_state.gather(1, slot.clamp_max(reach - 1))
    return torch.where(slot >= reach, tail, before) * documents.present_BW1


@operator("short_convolution")
@on_its_device
def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    returns_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(silu(bias + the convolution of x with the weight), the cache after the last token, else no elements).

    x: [B, T, D], which may be a slice of wider rows; weight: [D, W]; bias: [D]; cache: [N, D, W] of N sequences, None
    for zeros. cu_seqlens: int64 [N + 1], chunk_indices: int64 [chunks, 2] (`Segments`), both with B = 1, or none. The
    output and the cache have x's dtype; slot 0 of the cache has no gradient.
    """
    y, after = from_fla(CONV, "causal_conv1d_fwd")(
        x,
        weight,
        bias,
        None,
        initial_state=cache,
        output_final_state=returns_cache,
        activation="silu",
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    return y, after if returns_cache else _no_cache(x, cu_seqlens)


def _no_cache(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 0)


@short_convolution.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    returns_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    after = _no_cache(x, cu_seqlens)
    return x.new_empty(x.shape), x.new_empty(len(after), *weight.shape) if returns_cache else after


@operator("short_convolution_backward")
@on_its_device
def short_convolution_backward(
    dy: torch.Tensor,
    dcache: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight, bias and cache; of no elements where there is none. dcache: None for zeros."""
    dx, dweight, dbias, _, dbefore = from_fla(CONV, "causal_conv1d_bwd")(
        x,
        dy,
        None if dcache is None else dcache.contiguous(),
        weight=weight.contiguous(),
        bias=bias,
        initial_state=cache,
        activation="silu",
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    none = x.new_empty(0)
    return dx, dweight, none if dbias is None else dbias, none.clone() if dbefore is None else dbefore


@short_convolution_backward.register_fake
def _(
    dy: torch.Tensor,
    dcache: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias, dbefore = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, cache))
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias, dbefore


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.returns_cache = inputs[-1]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: torch.Tensor | None, dcache: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # one look: what is recomputed can be read once
    x, _, bias, cache, *_ = saved
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dbefore = short_convolution_backward(dy, dcache if ctx.returns_cache else None, *saved)
    return dx, dweight, None if bias is None else dbias, None if cache is None else dbefore, None, None, None


short_convolution.register_autograd(_gradient, setup_context=_save)
