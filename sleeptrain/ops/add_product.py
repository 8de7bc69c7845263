"""Products of two matrices, and rows, that are added to a tensor in wider precision."""

from __future__ import annotations

import torch

from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.operator import operator


def add_product(total: torch.Tensor | None, a_CN: torch.Tensor, b_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total + a @ b, [C, D] in `dtype`, in the memory of `total`; None: zero.

    A GPU adds the products of 16-bit matrices up in fp32, and to `total` in the same kernel. Elsewhere their sum is
    rounded to 16 bits first.
    """
    if runs_kernels(a_CN) and dtype == torch.float32 != a_CN.dtype:
        if total is None:
            return torch.mm(a_CN, b_ND, out_dtype=dtype)
        _add_wide_product(total, a_CN, b_ND)
        return total
    if total is None:
        return (a_CN @ b_ND).to(dtype)
    return total.addmm_(a_CN, b_ND) if a_CN.dtype == dtype else total.add_(a_CN @ b_ND)


# An operator of its own: compiled code would give torch's a new tensor and copy the result.
@operator("add_wide_product", changes=("total",))
def _add_wide_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


@_add_wide_product.register_fake
def _(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    return None


def add_rows(total: torch.Tensor, index_N: torch.Tensor, rows_ND: torch.Tensor) -> None:
    """total[index_N[n]] += rows_ND[n] for each n, in the dtype of `total`; an index may occur many times.

    The indices have been checked by an earlier look-up. On a GPU they are sorted, so the sums have one order in all
    runs, and the host does not wait.
    """
    torch.ops.aten._index_put_impl_(total, [index_N], rows_ND.to(total.dtype), accumulate=True, unsafe=True)
