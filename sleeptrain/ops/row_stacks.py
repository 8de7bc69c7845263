"""Rows of products that wait until many can be multiplied at once.

A product that adds to a large total reads and writes all of it. With few rows that takes longer than the
multiplication. Rows of such products are copied, and multiplied when many have come together (`stacking_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sleeptrain.ops.device import runs_kernels

FEW, STACKED = 513, 1536  # rows of a product that waits are fewer; rows that a stack holds
LARGE = 2**22  # elements of a total

Place = tuple[int, int]


def adds_wide(like: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if products of matrices like this one are added to a tensor of `dtype` without a rounding before."""
    return like.dtype == dtype or (runs_kernels(like) and dtype == torch.float32)


def multiply(total: torch.Tensor, a_CN: torch.Tensor, b_ND: torch.Tensor) -> None:
    """Add a @ b to the total at once."""
    if a_CN.dtype == total.dtype:
        total.addmm_(a_CN, b_ND)
    elif adds_wide(a_CN, total.dtype):
        torch.ops.aten.addmm.dtype_out(total, a_CN, b_ND, total.dtype, out=total)
    else:
        total.add_(a_CN @ b_ND)


class RowStack:
    """Rows of products a @ b that will be added to some totals, one for each a; they share b.

    Rows are copied, for compiled code reuses the memory of its own. The rows [start, stop) wait to be multiplied.
    """

    def __init__(self, totals: Sequence[torch.Tensor]) -> None:
        self._totals = totals
        self._rows = list[torch.Tensor]()
        self.start = self.stop = 0

    def next(self, count: int) -> int:
        """The place of so many rows more."""
        return self.stop if self.stop + count <= STACKED else 0

    def take(self, first: int, count: int) -> None:
        """Let the rows from `first` on wait, too. Call it before they are copied.

        Rows that wait elsewhere than next to them are multiplied.
        """
        if first == self.stop:
            self.stop += count
        elif first + count == self.start:
            self.start = first
        else:
            self.multiply()
            self.start, self.stop = first, first + count

    def copy(self, first: int, factors: Sequence[torch.Tensor], b_ND: torch.Tensor) -> None:
        """Copy the rows to their place, with one kernel. factors: a [C, N] of each total."""
        new = [*(a_CN.t() for a_CN in factors), b_ND]
        if not self._rows:
            self._rows = [t.new_empty(STACKED, t.shape[1]) for t in new]
        torch._foreach_copy_([rows[first : first + len(b_ND)] for rows in self._rows], new)

    def multiply(self) -> None:
        """Add the products of the waiting rows to the totals."""
        if self.start < self.stop:
            *factors, b = (rows[self.start : self.stop] for rows in self._rows)
            for total, dy in zip(self._totals, factors, strict=True):
                multiply(total, dy.t(), b)
        self.drop()

    def drop(self) -> None:
        """Forget the waiting rows."""
        self.start = self.stop = 0


class RowStacks:
    """The stacks of totals, made when they are first used."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[Place, ...], RowStack] = {}

    def of(self, totals: Sequence[torch.Tensor]) -> RowStack:
        """The stack of products that share b and are added to these totals."""
        places = tuple(map(_place, totals))
        if places not in self._stacks:
            self._stacks[places] = RowStack(totals)
        return self._stacks[places]

    def multiply(self) -> None:
        """Complete all totals."""
        for stack in self._stacks.values():
            stack.multiply()

    def drop(self) -> None:
        for stack in self._stacks.values():
            stack.drop()


class RecordedRows:
    """The rows that a recorded function copies, at each replay to the same place.

    A replay runs no code that could count rows. So their place is chosen before the recording, and `take` says before
    each replay that they will be there.
    first: of the rows; None: products are added at once.
    """

    def __init__(self, first: int | None) -> None:
        self.first = first
        self._counts: dict[RowStack, int] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, products copy their rows to this place. No rows may wait there."""
        global _recorded
        self._counts = {}
        before, _recorded = _recorded, self
        try:
            yield
        finally:
            _recorded = before

    def add(self, stack: RowStack, factors: Sequence[torch.Tensor], b_ND: torch.Tensor) -> bool:
        """Copy the rows. False if the stack has rows of this function already, or they would not fit."""
        assert self.first is not None
        if stack in self._counts or self.first + len(b_ND) > STACKED:
            return False
        self._counts[stack] = len(b_ND)
        stack.copy(self.first, factors, b_ND)
        return True

    def take(self) -> None:
        """Let the rows of a replay wait. Call it before the replay."""
        for stack, count in self._counts.items():
            assert self.first is not None
            stack.take(self.first, count)


_owners: dict[Place, RowStacks] = {}  # by the place of a total
_recorded: RecordedRows | None = None


def fixed_place(count: int, number: int) -> int | None:
    """The place of the `number`-th (0, 1, ...) of several products of `count` rows each; None for many rows."""
    return None if count >= FEW else number % max(STACKED // count, 1) * count


def keeps_rows(totals: Sequence[torch.Tensor], b_ND: torch.Tensor) -> list[bool]:
    """For each of some totals whose products share b: True if the product is added later (`stacking_rows`).

    The rows of small totals wait if those of a large one do: they are copied in the same kernel.
    """
    is_placed = _recorded is None or _recorded.first is not None
    owned = [len(b_ND) < FEW and is_placed and _place(total) in _owners for total in totals]
    is_large = any(total.numel() >= LARGE for total, is_owned in zip(totals, owned, strict=True) if is_owned)
    return [is_owned and is_large for is_owned in owned]


def keep_rows(totals: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], b_ND: torch.Tensor) -> bool:
    """Keep the rows of products for totals that `keeps_rows` named. False if they must be added at once."""
    stack = _owners[_place(totals[0])].of(totals)
    if _recorded is not None:
        return _recorded.add(stack, factors, b_ND)
    first = stack.next(len(b_ND))
    stack.take(first, len(b_ND))
    stack.copy(first, factors, b_ND)
    return True


@contextmanager
def stacking_rows(totals: Sequence[torch.Tensor], stacks: RowStacks | None = None) -> Iterator[None]:
    """Let products of few rows be added to these totals later, many rows at once; at exit totals are complete.

    Only for totals for which `adds_wide` is true. After an error rows are dropped. stacks: keep their memory for later
    calls; None: it lives inside.
    """
    stacks = RowStacks() if stacks is None else stacks
    places = [_place(total) for total in totals]
    _owners.update(dict.fromkeys(places, stacks))
    try:
        yield
        stacks.multiply()
    finally:
        stacks.drop()
        for place in places:
            del _owners[place]


def _place(t: torch.Tensor) -> Place:
    return t.untyped_storage()._cdata, int(t.storage_offset())
