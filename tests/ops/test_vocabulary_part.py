"""The loss joined from parts of a vocabulary, against the cross entropy of whole logits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.ops.vocabulary_part import part_gradients, part_statistics

N, V, D = 11, 23, 6
CUTS = (0, 7, 7, 23)  # the second part is empty


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, D, generator=draw, dtype=torch.float64) for size in (N, V))
    return x, weight, torch.randint(V, (N,), generator=draw)


def joined(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, keep: bool, adds: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, gradient of x, gradient of the weight in fp64 or fp32) from three parts. x: in the dtype of products."""
    parts = []
    for first, last in pairwise(CUTS):
        copy = weight[first:last].to(x.dtype)
        parts.append((first, last, copy, *part_statistics(x, copy, targets - first, rows, keep)))
    log_sums = torch.stack([statistics[0] for *_, statistics, _ in parts]).logsumexp(0)
    target_logits = sum(statistics[1] for *_, statistics, _ in parts)
    dx, dweight = torch.zeros(N, D, dtype=torch.float64), torch.zeros_like(weight)
    for first, last, copy, _, kept in parts:
        assert bool(kept) == keep
        leaf, own = x.detach().requires_grad_(), weight[first:last].detach().requires_grad_()
        gradient = dweight[first:last] if adds else None
        part_gradients(leaf, own, targets - first, log_sums, copy, gradient, rows, kept).backward()
        assert leaf.grad is not None and (own.grad is None) == adds
        dx += leaf.grad
        if own.grad is not None:
            dweight[first:last] = own.grad
    return (log_sums - target_logits).sum(), dx, dweight


@pytest.mark.parametrize(("rows", "keep", "adds"), [(4, True, False), (4, False, True), (64, True, True)])
def test_parts_are_the_whole(rows: int, keep: bool, adds: bool) -> None:
    x, weight, targets = inputs()
    found = joined(x, weight, targets, rows, keep, adds)
    x.requires_grad_(), weight.requires_grad_()
    loss = F.cross_entropy(x @ weight.t(), targets, reduction="sum")
    for one, exact in zip(found, (loss, *torch.autograd.grad(loss, (x, weight))), strict=True):
        torch.testing.assert_close(one, exact, rtol=0, atol=1e-13)


def test_exponentials_and_the_gradient_of_the_weight_are_wide() -> None:
    """In bf16 statistics are fp32, and the gradient adds up in fp32: one row at a time is as exact as all."""
    x, weight, targets = inputs()
    exact = joined(x, weight, targets, 64, True)
    errors = {}
    for rows in (1, 64):
        loss, _, dweight = joined(x.bfloat16(), weight.float(), targets, rows, True)
        assert loss.dtype == dweight.dtype == torch.float32
        errors[rows] = float((dweight - exact[2]).norm() / exact[2].norm())
    assert errors[1] < 1.2 * errors[64] < 0.02
