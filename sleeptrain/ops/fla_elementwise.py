"""RMSNorm, the gated RMSNorm and SwiGLU by flash-linear-attention's kernels, as operators of torch with gradients.

They compute in fp32 and save their arguments: no fp32 copy of a narrow tensor, and no intermediate result but 1 / rms.
Arguments are contiguous, except that the kernels of SwiGLU read slices of wider rows where they lie. The last
dimension has at most 65536 bytes; kernels of norms raise RuntimeError for a wider one.
"""

from __future__ import annotations

from typing import Any

import torch

from sleeptrain.ops.fla_package import from_fla, on_its_device
from sleeptrain.ops.operator import operator

NORM = "fla.modules.norm.layernorm"
GATED = "fla.modules.norm.fused_norm_gate"
ACTIVATIONS = "fla.modules.activations.ops"


@operator("rms_norm")
@on_its_device
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x * rsqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype; the factor, fp32).

    x: [..., D] with at least one element; weight: [D] fp32.
    """
    y, _, factor, _ = from_fla(NORM, "layer_norm_fwd")(x.view(-1, x.shape[-1]), weight, None, eps, is_rms_norm=True)
    return y.view(x.shape), factor.view(x.shape[:-1])


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("add_rms_norm")
@on_its_device
def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + y; `rms_norm` of the sum before it is rounded, and its factor). x, y: [..., D] of one dtype."""
    y_rows, residual = (t.view(-1, x.shape[-1]) for t in (y, x))
    normed, _, factor, total = from_fla(NORM, "layer_norm_fwd")(
        y_rows, weight, None, eps, residual=residual, is_rms_norm=True
    )
    return total.view(x.shape), normed.view(x.shape), factor.view(x.shape[:-1])


@add_rms_norm.register_fake
def _(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("rms_norm_backward")
@on_its_device
def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    dx_beside: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight. dx_beside: the gradient of x from elsewhere, which is added; None: zero."""
    dim = x.shape[-1]
    dx, dweight, *_ = from_fla(NORM, "layer_norm_bwd")(
        dy.contiguous().view(-1, dim),
        x.view(-1, dim),
        weight,
        None,
        rstd=factor.view(-1),
        dres=None if dx_beside is None else dx_beside.contiguous().view(-1, dim),
        is_rms_norm=True,
    )
    return dx.view(x.shape), dweight


@rms_norm_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor, dx_beside: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, _ = inputs
    factor = output[1]
    ctx.save_for_backward(*tensors, factor)
    ctx.mark_non_differentiable(factor)


def _norm_gradient(ctx: Any, dy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return *rms_norm_backward(dy, *ctx.saved_tensors, None), None


rms_norm.register_autograd(_norm_gradient, setup_context=_save_norm)


@operator("gated_rms_norm")
@on_its_device
def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x) * silu(gate) in x's dtype; the norm's factor, fp32). x, gate: [..., D]; weight: [D] fp32."""
    dim = x.shape[-1]
    y, _, factor, _ = from_fla(GATED, "layer_norm_gated_fwd")(
        x.view(-1, dim), gate.view(-1, dim), weight, None, eps=eps, is_rms_norm=True
    )
    return y.view(x.shape), factor.view(x.shape[:-1])


@gated_rms_norm.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("gated_rms_norm_backward")
@on_its_device
def gated_rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, gate and weight."""
    dim = x.shape[-1]
    rows = (t.view(-1, dim) for t in (dy.contiguous(), x, gate))
    dx, dgate, dweight, *_ = from_fla(GATED, "layer_norm_gated_bwd")(
        *rows, weight, None, rstd=factor.view(-1), is_rms_norm=True
    )
    return dx.view(x.shape), dgate.view(gate.shape), dweight


@gated_rms_norm_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _gated_gradient(ctx: Any, dy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return *gated_rms_norm_backward(dy, *ctx.saved_tensors), None


gated_rms_norm.register_autograd(_gated_gradient, setup_context=_save_norm)


@operator("swiglu")
@on_its_device
def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value in gate's dtype. gate, value: [..., D]."""
    return from_fla(ACTIVATIONS, "swiglu_fwd")(gate, value, output_contiguous=True)


@swiglu.register_fake
def _(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@operator("swiglu_backward")
@on_its_device
def swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and value."""
    return from_fla(ACTIVATIONS, "swiglu_fwdbwd")(gate, value, dy, output_contiguous=True)


@swiglu_backward.register_fake
def _(dy: torch.Tensor, gate: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), value.new_empty(value.shape)


def _save_swiglu(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dvalue = swiglu_backward(dy, *ctx.saved_tensors)
    return dgate, dvalue


swiglu.register_autograd(_swiglu_gradient, setup_context=_save_swiglu)
