"""Cross entropy over a part of a vocabulary: what it contributes to the loss, and its gradients once that is known.

As in `linear_cross_entropy`, logits are computed some rows at a time, and are widened to fp32 before exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sleeptrain.ops.add_product import gradient_dtype
from sleeptrain.ops.linear_cross_entropy import head_gradients


def part_statistics(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, rows: int, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(log-sum-exp of the part's logits and the target's logit or 0, [2, N] in fp32 or wider; kept logits).

    weight_VD: the part's rows, in x's dtype. targets_N: int64 rows of the part; others are targets of other parts.
    rows: the number of rows of x whose logits are held at once. keep: return all logits, in x's dtype.
    """
    found, kept = list[torch.Tensor](), list[torch.Tensor]()
    for x_part, targets_part in zip(x_ND.split(rows), targets_N.split(rows), strict=True):
        logits = x_part @ weight_VD.t()
        found.append(_statistics(logits, targets_part))
        if keep:
            kept.append(logits)
    return torch.cat(found, 1), kept


def _statistics(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not logits.shape[1]:  # of a short vocabulary, a part may be padding alone
        none = wide.new_zeros(len(targets))
        return torch.stack([none - torch.inf, none])
    inside = (targets >= 0) & (targets < logits.shape[1])
    own = wide.gather(1, targets.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.stack([wide.logsumexp(1), torch.where(inside, own, 0.0)])


def part_gradients(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    log_sums_N: torch.Tensor,
    copy_VD: torch.Tensor,
    gradient_VD: torch.Tensor | None,
    rows: int,
    kept: list[torch.Tensor],
) -> torch.Tensor:
    """A scalar, 0, whose gradients of x and the weight are those of the summed cross entropy.

    log_sums_N: log-sum-exp of the logits of all parts. copy_VD, gradient_VD: as in `linear_cross_entropy`. kept: the
    logits that `part_statistics` has kept; empty: they are computed again. The backward destroys them.
    """
    objective: torch.Tensor = _PartGradients.apply(
        x_ND, weight_VD, copy_VD, gradient_VD, targets_N, log_sums_N, rows, kept
    )
    return objective


class _PartGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        copy: torch.Tensor,
        gradient: torch.Tensor | None,
        targets: torch.Tensor,
        log_sums: torch.Tensor,
        rows: int,
        kept: list[torch.Tensor],
    ) -> torch.Tensor:
        ctx.rows, ctx.gradient_dtype, ctx.gradient = rows, gradient_dtype(weight), gradient
        ctx.are_logits = True
        ctx.save_for_backward(x, copy, targets, log_sums, *kept)
        return log_sums.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        targets = ctx.saved_tensors[2]
        dx, dweight = head_gradients(ctx, d.expand(len(targets)), whole=False)
        return dx, dweight, None, None, None, None, None, None
