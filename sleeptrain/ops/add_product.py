"""Products of two matrices that are added to a tensor in wider precision."""

from __future__ import annotations

import torch

from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.operator import operator


def gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the gradient of a weight adds up: fp32 for a narrow weight, else that of the weight."""
    return torch.promote_types(weight.dtype, torch.float32)


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
