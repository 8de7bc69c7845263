"""Where elements lie in a whole tensor: slices, and fragments of flattened slices. Only bookkeeping.

A checkpoint's files hold fragments as their writers hold them. A place says which elements of the whole tensor a
fragment is, whatever layout wrote it, so that any other layout can find the elements that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch

Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Slice:
    """Some indices of each dimension of a whole tensor; the slice is their product.

    shape: that of the whole tensor.
    ranges: for each dimension the ranges of indices, laid end to end.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]

    @staticmethod
    def cut(shape: Sequence[int], ranges: Mapping[int, Sequence[Range]] | None = None) -> Slice:
        """The slice with these ranges in some dimensions, and all indices of the others."""
        chosen = ranges or {}
        return Slice(tuple(shape), tuple(tuple(chosen.get(d, ((0, size),))) for d, size in enumerate(shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the slice itself."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def box(self, bounds: Sequence[Range]) -> Slice:
        """The part of the slice within these bounds, which count in the slice's own dimensions."""
        return Slice(self.shape, tuple(_within(r, *bound) for r, bound in zip(self.ranges, bounds, strict=True)))


@dataclass(frozen=True)
class Place:
    """The elements [start, start + numel) of a flattened slice."""

    slice: Slice
    start: int
    numel: int

    @staticmethod
    def whole(shape: Sequence[int]) -> Place:
        return Place.of(Slice.cut(shape))

    @staticmethod
    def of(part: Slice) -> Place:
        """All elements of a slice."""
        return Place(part, 0, part.numel)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.slice.shape

    @property
    def is_whole(self) -> bool:
        return self == Place.whole(self.shape)

    def share(self, index: int, count: int) -> Place:
        """One of `count` shares of about equal size."""
        first, last = index * self.numel // count, (index + 1) * self.numel // count
        return Place(self.slice, self.start + first, last - first)

    def boxes(self) -> Iterator[tuple[int, Slice]]:
        """Slices that make up the place, in order, each with the number of elements before it."""
        for at, bounds in _boxes(self.slice.sizes, self.start, self.start + self.numel):
            yield at - self.start, self.slice.box(bounds)


class Placed(NamedTuple):
    """Elements of a whole tensor. tensor: any shape, in the order of the place's elements."""

    tensor: torch.Tensor
    place: Place


# Of a checkpoint: by name, whole tensors or elements of them.
Tensors = Mapping[str, torch.Tensor | Placed]


def placed(tensor: torch.Tensor | Placed) -> Placed:
    return tensor if isinstance(tensor, Placed) else Placed(tensor, Place.whole(tensor.shape))


class Overlap(NamedTuple):
    """A box that two slices share: where it begins in each of them, and its size, by dimension."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    sizes: tuple[int, ...]


def overlaps(first: Slice, second: Slice) -> Iterator[Overlap]:
    """The boxes that two slices of one tensor share; together they are all common elements, each once."""
    by_dim = [_common(a, b) for a, b in zip(first.ranges, second.ranges, strict=True)]
    for parts in product(*by_dim):
        columns = list(zip(*parts, strict=True)) or [(), (), ()]
        yield Overlap(*columns)


def _boxes(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[Range, ...]]]:
    """(first element, bounds) of the fewest boxes that are the elements [start, stop) of a tensor, in order."""
    if start >= stop:
        return
    if not sizes:
        yield start, ()
        return
    inner = prod(sizes[1:])
    row, end = start // inner, stop // inner
    if start % inner or row == end:
        last = min(stop, (row + 1) * inner)
        for at, bounds in _boxes(sizes[1:], start - row * inner, last - row * inner):
            yield row * inner + at, ((row, row + 1), *bounds)
        row += 1
    if row < end:
        yield row * inner, ((row, end), *((0, size) for size in sizes[1:]))
    if row <= end and end * inner < stop:
        for at, bounds in _boxes(sizes[1:], 0, stop - end * inner):
            yield end * inner + at, ((end, end + 1), *bounds)


def _within(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """The part [start, stop) of ranges laid end to end."""
    parts, before = list[Range](), 0
    for first, last in ranges:
        low, high = max(first, first + start - before), min(last, first + stop - before)
        if low < high:
            parts.append((low, high))
        before += last - first
    return tuple(parts)


def _common(first: Sequence[Range], second: Sequence[Range]) -> list[tuple[int, int, int]]:
    """(place in first, place in second, size) of the indices that both lists of ranges have."""
    found, before = list[tuple[int, int, int]](), 0
    for a, b in first:
        offset = 0
        for c, d in second:
            low, high = max(a, c), min(b, d)
            if low < high:
                found.append((before + low - a, offset + low - c, high - low))
            offset += d - c
        before += b - a
    return found
