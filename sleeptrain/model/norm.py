"""RMSNorm: zero-centred, with a plain weight, over all heads, and gated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sleeptrain.model.linear import is_called_with_hooks
from sleeptrain.ops import fla_elementwise
from sleeptrain.ops.device import runs_kernels


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight with a hand-written backward, on a CPU three times as fast as that of autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        unit = x * rstd
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        inner = grad * weight
        along = torch.linalg.vecdot(inner, unit).unsqueeze(-1).div_(x.shape[-1])
        return inner.sub_(unit.mul_(along)).mul_(rstd), grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 or wider, returned in x's dtype.

    x: [..., D] floating point; weight: [D].
    """
    if runs_kernels(x) and x.numel():
        y, _ = fla_elementwise.rms_norm(x.contiguous(), weight.float(), eps)
        return y
    wide = x if x.dtype == torch.float64 else x.float()
    return _RMSNorm.apply(wide, weight.to(wide.dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension.

    kind: `zero_centred`: the scale is 1 + weight, so weight 0 is the identity; `plain`: the scale is the weight.
    scale: 1 + weight, where it is known; None: each use computes it.
    """

    scale: torch.Tensor | None = None

    def __init__(self, dim: int, eps: float, kind: str = "zero_centred"):
        super().__init__()
        self.zero_centred = kind == "zero_centred"
        self.weight = nn.Parameter(torch.zeros(dim) if self.zero_centred else torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.factors(), self.eps)

    def factors(self) -> torch.Tensor:
        """What it multiplies by, [D]."""
        if not self.zero_centred:
            return self.weight
        if self.scale is None:
            return 1.0 + self.weight
        scale: torch.Tensor = _KnownScale.apply(self.weight, self.scale)
        return scale


class _KnownScale(torch.autograd.Function):
    """The known value of 1 + weight, whose gradient is that of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def sum_and_norm(norm: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, norm(x + y)); y: None for zeros.

    On a GPU it is one kernel, and in the backward, too, which adds the gradient of the sum to that of the norm's input.
    A norm that is no plain `RMSNorm` or has a hook, and tensors of two dtypes, are added and normed one by one.
    """
    of_one_dtype = y is None or y.dtype == x.dtype
    if isinstance(norm, RMSNorm) and _is_plain(norm) and runs_kernels(x) and x.numel() and of_one_dtype:
        total, normed = _SumAndNorm.apply(x.contiguous(), y, norm.factors().float(), norm.eps)
    else:
        total = x if y is None else x + y
        normed = norm(total)
    return total, normed


def _is_plain(norm: RMSNorm) -> bool:
    return type(norm) is RMSNorm and not is_called_with_hooks(norm)


class _SumAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor | None, scale: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if y is None:
            total = x
            normed, factor = fla_elementwise.rms_norm.overload(x, scale, eps)
        else:
            total, normed, factor = fla_elementwise.add_rms_norm(x, y.contiguous(), scale, eps)
        ctx.save_for_backward(total, scale, factor)
        ctx.set_materialize_grads(False)
        ctx.adds = y is not None
        return total.view_as(total), normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dtotal: torch.Tensor | None, dnormed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        total, scale, factor = ctx.saved_tensors
        dx, dscale = dtotal, None
        if dnormed is not None:
            dx, dscale = fla_elementwise.rms_norm_backward(dnormed, total, scale, factor, dtotal)
        return dx, dx if ctx.adds else None, dscale, None


class HeadsRMSNorm(RMSNorm):
    """RMSNorm over all heads of a token together: x is [..., num_heads, head_dim]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class GatedRMSNorm(nn.Module):
    """RMSNorm with a plain weight and a SiLU gate, applied after the norm (Gated DeltaNet) or before it (Mamba-2)."""

    def __init__(self, dim: int, eps: float, gate_first: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.gate_first = gate_first

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x, gate: [..., D]; the gate acts in fp32 (fp64 for fp64 inputs)."""
        if runs_kernels(x) and x.numel() and not self.gate_first:
            y, _ = fla_elementwise.gated_rms_norm(x.contiguous(), gate.contiguous(), self.weight.float(), self.eps)
            return y
        wide = x if x.dtype == torch.float64 else x.float()
        gate = F.silu(gate.to(wide.dtype))
        y = (
            rms_norm(wide * gate, self.weight, self.eps)
            if self.gate_first
            else rms_norm(wide, self.weight, self.eps) * gate
        )
        return y.to(x.dtype)
