"""Products of two matrices, and rows, that are added to a tensor in wider precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.operator import operator

# A product that adds to a large total reads and writes all of it. With fewer than FEW rows that takes longer than the
# multiplication; rows are then kept, and STACKED of them multiplied at once.
FEW, STACKED = 513, 1024
LARGE = 2**22  # elements of a total


def gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the gradient of a weight adds up: fp32 for a narrow weight, else that of the weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def add_product(total: torch.Tensor | None, a_CN: torch.Tensor, b_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total + a @ b, [C, D] in `dtype`, in the memory of `total`; None: zero.

    A GPU adds the products of 16-bit matrices up in fp32, and to `total` in the same kernel. Elsewhere their sum is
    rounded to 16 bits first. Inside `stacking_rows` the sum may be added later.
    """
    if total is not None:
        _add_wide_product(total, a_CN, b_ND)
        return total
    if adds_wide(a_CN, dtype) and a_CN.dtype != dtype:
        return torch.mm(a_CN, b_ND, out_dtype=dtype)
    return (a_CN @ b_ND).to(dtype)


def adds_wide(like: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if products of matrices like this one are added to a tensor of `dtype` without a rounding before."""
    return like.dtype == dtype or (runs_kernels(like) and dtype == torch.float32)


# An operator of its own: compiled code would give torch's a new tensor and copy the result, and could not keep rows.
@operator("add_wide_product", changes=("total",))
def _add_wide_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if keeps_rows(total, b):
        _stacks[_place(total)].add(a, b)
    else:
        _multiply(total, a, b)


@_add_wide_product.register_fake
def _(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    return None


def keeps_rows(total: torch.Tensor, b_ND: torch.Tensor) -> bool:
    """True if the product with these rows is added to the total later (`stacking_rows`)."""
    return len(b_ND) < FEW and _place(total) in _stacks


def _multiply(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif adds_wide(a, total.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(a @ b)


class _Stack:
    """Rows of products that will be added to a total. They are copied: compiled code reuses the memory of its own."""

    def __init__(self, total: torch.Tensor) -> None:
        self._total, self._filled = total, 0
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, a_CN: torch.Tensor, b_ND: torch.Tensor) -> None:
        if self._filled + len(b_ND) > STACKED:
            self.multiply()
        if self._rows is None:
            self._rows = b_ND.new_empty(STACKED, len(a_CN)), b_ND.new_empty(STACKED, b_ND.shape[1])
        for rows, new in zip(self._rows, (a_CN.t(), b_ND), strict=True):
            rows[self._filled : self._filled + len(new)] = new
        self._filled += len(b_ND)

    def multiply(self) -> None:
        """Add the product of the rows to the total."""
        if self._rows is not None and self._filled:
            dy, x = (rows[: self._filled] for rows in self._rows)
            _multiply(self._total, dy.t(), x)
        self._filled = 0


_stacks: dict[tuple[int, int], _Stack] = {}  # by the total's place in memory


@contextmanager
def stacking_rows(totals: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let products of few rows be added to these totals later, many rows at once; at exit totals are complete.

    Only for totals for which `adds_wide` is true. After an error rows are dropped.
    """
    stacks = {_place(total): _Stack(total) for total in totals if total.numel() >= LARGE}
    _stacks.update(stacks)
    try:
        yield
        for stack in stacks.values():
            stack.multiply()
    finally:
        for place in stacks:
            del _stacks[place]


def _place(t: torch.Tensor) -> tuple[int, int]:
    return t.untyped_storage()._cdata, int(t.storage_offset())


def add_rows(total: torch.Tensor, index_N: torch.Tensor, rows_ND: torch.Tensor) -> None:
    """total[index_N[n]] += rows_ND[n] for each n, in the dtype of `total`; an index may occur many times.

    The indices have been checked by an earlier look-up. On a GPU they are sorted, so the sums have one order in all
    runs, and the host does not wait.
    """
    torch.ops.aten._index_put_impl_(total, [index_N], rows_ND.to(total.dtype), accumulate=True, unsafe=True)
