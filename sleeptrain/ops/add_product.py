"""Products of two matrices, and rows, that are added to a tensor in wider precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sleeptrain.ops.operator import operator
from sleeptrain.ops.row_stacks import adds_wide, keep_rows, keeps_rows, multiply


def gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the gradient of a weight adds up: fp32 for a narrow weight, else that of the weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def add_product(total: torch.Tensor | None, a_CN: torch.Tensor, b_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total + a @ b, [C, D] in `dtype`, in the memory of `total`; None: zero.

    A GPU adds the products of 16-bit matrices up in fp32, and to `total` in the same kernel. Elsewhere their sum is
    rounded to 16 bits first. Inside `stacking_rows` the sum may be added later.
    """
    if total is not None:
        _add_wide_products([total], [a_CN], b_ND)
        return total
    if adds_wide(a_CN, dtype) and a_CN.dtype != dtype:
        return torch.mm(a_CN, b_ND, out_dtype=dtype)
    return (a_CN @ b_ND).to(dtype)


def add_products(totals: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], b_ND: torch.Tensor) -> None:
    """Add a @ b to each total, as `add_product` does. factors: a [C, N] of each total, which share b."""
    if totals:
        _add_wide_products(totals, factors, b_ND)


# An operator of its own: compiled code would give torch's a new tensor and copy the result, and could not keep rows.
@operator("add_wide_products", changes=("totals",))
def _add_wide_products(totals: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], b: torch.Tensor) -> None:
    is_late = keeps_rows(totals, b)
    late_totals, late_factors = (
        [t for t, waits in zip(each, is_late, strict=True) if waits] for each in (totals, factors)
    )
    if late_totals and not keep_rows(late_totals, late_factors, b):
        is_late = [False] * len(totals)
    for total, a, waits in zip(totals, factors, is_late, strict=True):
        if not waits:
            multiply(total, a, b)


@_add_wide_products.register_fake
def _(totals: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], b: torch.Tensor) -> None:
    return None


def add_rows(total: torch.Tensor, index_N: torch.Tensor, rows_ND: torch.Tensor) -> None:
    """total[index_N[n]] += rows_ND[n] for each n, in the dtype of `total`; an index may occur many times.

    The indices have been checked by an earlier look-up. On a GPU they are sorted, so the sums have one order in all
    runs, and the host does not wait.
    """
    torch.ops.aten._index_put_impl_(total, [index_N], rows_ND.to(total.dtype), accumulate=True, unsafe=True)
