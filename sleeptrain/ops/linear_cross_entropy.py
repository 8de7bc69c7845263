"""Cross entropy over a large vocabulary from features: logits are computed some rows at a time and never held whole.

Products have the dtype of the features. Logits are widened to fp32 inside the cross entropy, and the gradient of the
weight adds up over all rows in `gradient_dtype`. `torch.nn.functional.linear_cross_entropy` has the same memory; on a
GPU it multiplies in fp32 in the backward, without tensor cores, or adds the gradient of the weight up in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sleeptrain.ops import fla_cross_entropy
from sleeptrain.ops.add_product import add_product, gradient_dtype
from sleeptrain.ops.device import runs_kernels


def linear_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    copy_VD: torch.Tensor | None = None,
    gradient_VD: torch.Tensor | None = None,
    rows: int,
    keep: bool,
) -> torch.Tensor:
    """The losses [N] of logits x @ weight^T, in nats, fp32 or wider.

    targets_N: int64. copy_VD: the weight in x's dtype; None: the weight. gradient_VD: the backward adds the weight's
    gradient to it; None: autograd does. rows: the number of rows whose logits are held at once. keep: keep all logits,
    in x's dtype, for one backward, which turns them into their gradients; another one computes them again.
    """
    copy = weight_VD if copy_VD is None else copy_VD
    losses: torch.Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, copy, gradient_VD, targets_N, rows, keep)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        copy: torch.Tensor,
        gradient: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
        keep: bool,
    ) -> torch.Tensor:
        found, kept = list[tuple[torch.Tensor, torch.Tensor]](), list[torch.Tensor]()
        for x_part, targets_part in zip(x.split(rows), targets.split(rows), strict=True):
            logits = x_part @ copy.t()
            found.append(_cross_entropy(logits, targets_part))
            if keep:
                kept.append(logits)
        losses, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.rows, ctx.gradient_dtype, ctx.gradient = rows, gradient_dtype(weight), gradient
        ctx.are_logits = True
        ctx.save_for_backward(x, copy, targets, lse, *kept)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *head_gradients(ctx, dlosses, whole=True), None, None, None, None, None


def head_gradients(ctx: Any, dlosses: torch.Tensor, whole: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and of the weight in a backward; that of the weight is None if it was added to `ctx.gradient`.

    ctx: of a function of x and the weight, with saved x, the weight in x's dtype, targets, log-sum-exp and logits. The
        logits are replaced by their gradient; a second backward computes them again.
    whole: the weight is that of the whole vocabulary; else targets that are none of its rows are ignored.
    """
    x, copy, targets, lse, *kept = ctx.saved_tensors
    keeps, ctx.are_logits = bool(kept) and ctx.are_logits, False
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx, dweight = torch.empty_like(x) if needs_x else None, ctx.gradient
    parts = zip(*(t.split(ctx.rows) for t in (x, targets, lse, dlosses)), strict=True)
    for index, (x_part, targets_part, lse_part, dlosses_part) in enumerate(parts):
        # `data`: autograd would refuse a second backward after a change of a saved tensor.
        logits = kept[index].data if keeps else x_part @ copy.t()
        dlogits = _logits_gradient(logits, targets_part, lse_part, dlosses_part, whole)
        if dx is not None:
            torch.mm(dlogits, copy, out=dx[index * ctx.rows :][: len(x_part)])
        if needs_weight:
            dweight = add_product(dweight, dlogits.t(), x_part, ctx.gradient_dtype)
    return dx, dweight if ctx.gradient is None else None


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the losses, the logarithms of the sums of exponentials), [N] in fp32 or wider."""
    if runs_kernels(logits):
        return fla_cross_entropy.cross_entropy(logits, targets)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = wide.logsumexp(1)
    return lse - wide.gather(1, targets[:, None]).squeeze(1), lse


def _logits_gradient(
    logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, dlosses: torch.Tensor, whole: bool
) -> torch.Tensor:
    """The gradients of the logits, in their dtype and, if that is fp32 or wider, in their memory."""
    if runs_kernels(logits) and whole:
        fla_cross_entropy.cross_entropy_backward(logits, targets, lse, dlosses.contiguous())
        return logits
    wide = logits.to(lse.dtype).sub_(lse[:, None]).exp_()
    if logits.shape[1]:
        inside = ((targets >= 0) & (targets < logits.shape[1])).to(wide.dtype)
        wide.scatter_add_(1, targets.clamp(0, logits.shape[1] - 1)[:, None], -inside[:, None])
    return wide.mul_(dlosses[:, None]).to(logits.dtype)
