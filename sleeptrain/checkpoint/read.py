"""Reading the tensors of a checkpoint: whole ones, or some of their elements. No code of the files is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import NamedTuple, Protocol

import torch

from sleeptrain.checkpoint.folder import TENSORS
from sleeptrain.checkpoint.place import Overlap, Place, Slice, overlaps
from sleeptrain.checkpoint.tensor_file import Stored, header_size, parse_header
from sleeptrain.distributed.world import World
from sleeptrain.errors import DataError
from sleeptrain.remote import Location, UrlPath

# Bytes between wanted ones that are read too, rather than in one read more.
GAP, GAP_OF_URL = 2**12, 2**20


class Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class SavedTensors(Protocol):
    """The tensors of a checkpoint. forms: {tensor name: shape and dtype}. Each process reads independently."""

    @property
    def forms(self) -> Mapping[str, Form]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU."""

    def elements(self, name: str, place: Place) -> torch.Tensor:
        """The elements [numel] of a tensor at a place, on the CPU. Little more than these is read."""


# A file and what is in it.
Listed = tuple[str, list[Stored]]


class TensorFiles:
    """The tensors in a checkpoint's folder. Raises DataError if they cannot be read.

    world: all its processes open the folder together, and each reads its share of the files' headers; None: this
    process reads them all.
    """

    def __init__(self, path: Location, world: World | None = None):
        self._path = path
        listed = world.all_or_raise(lambda: self._list(world.rank, world.size)) if world else [self._list(0, 1)]
        self._parts: dict[str, list[tuple[str, Stored]]] = {}
        for file, stored in (item for part in listed for item in part):
            for one in stored:
                self._parts.setdefault(one.name, []).append((file, one))
        self.forms = {name: self._form(name, [s for _, s in parts]) for name, parts in self._parts.items()}

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.forms[name].shape
        return self.elements(name, Place.whole(shape)).view(shape)

    def elements(self, name: str, place: Place) -> torch.Tensor:
        values = torch.empty(place.numel, dtype=self.forms[name].dtype)
        filled = 0
        try:
            for start, wanted in place.boxes():
                target = values[start : start + wanted.numel].view(wanted.sizes)
                for file, stored in self._parts[name]:
                    filled += self._fill(target, wanted, file, stored)
        except OSError as error:
            raise DataError(f"checkpoint {self._path} cannot be read: {error}") from error
        if filled != place.numel:
            raise DataError(f"checkpoint {self._path} lacks elements of {name}; use another checkpoint")
        return values

    def _fill(self, target: torch.Tensor, wanted: Slice, file: str, stored: Stored) -> int:
        """Read those of the wanted elements that a file has. Returns how many these are."""
        parts = [(before, have, list(overlaps(have, wanted))) for before, have in stored.place.boxes()]
        if not any(shared for _, _, shared in parts):
            return 0
        with open_ranges(self._path / file) as read:
            for before, have, shared in parts:
                at = stored.offset + before * stored.dtype.itemsize
                _copy(target, read, at, have.sizes, shared, GAP_OF_URL if isinstance(self._path, UrlPath) else GAP)
        return sum(prod(box.sizes) for _, _, shared in parts for box in shared)

    def _list(self, rank: int, size: int) -> list[Listed]:
        """The tensors of this process's share of the files."""
        listed = list[Listed]()
        paths: list[Location] = [*self._path.glob(TENSORS)]
        for path in sorted(paths, key=lambda path: path.name)[rank::size]:
            try:
                total = path.stat().st_size
                with open_ranges(path) as read:
                    length = header_size(bytes(read(0, min(8, total))), total)
                    listed.append((path.name, parse_header(bytes(read(8, length)), total)))
            except (OSError, ValueError) as error:
                raise DataError(f"checkpoint {self._path} cannot be read: {path.name}: {error}") from error
        return listed

    def _form(self, name: str, parts: Sequence[Stored]) -> Form:
        shape, dtype = parts[0].place.shape, parts[0].dtype
        if any((part.place.shape, part.dtype) != (shape, dtype) for part in parts):
            raise DataError(f"checkpoint {self._path} has fragments of {name} that do not go with each other")
        if sum(part.place.numel for part in parts) != prod(shape):
            raise DataError(f"checkpoint {self._path} does not hold each element of {name} once")
        return Form(shape, dtype)


# (offset, number of bytes) -> the bytes.
Read = Callable[[int, int], bytearray]


@contextmanager
def open_ranges(path: Location) -> Iterator[Read]:
    """Opens a file for reads of ranges of its bytes. These raise OSError where the file ends before the range does."""

    def read(offset: int, size: int) -> bytearray:
        file.seek(offset)
        content = bytearray(size)
        if (filled := file.readinto(content)) < size:
            raise OSError(f"{path.name} ends after {offset + filled} bytes")
        return content

    if isinstance(path, UrlPath):
        yield lambda offset, size: bytearray(path.read_range(offset, size))
        return
    with open(path, "rb") as file:
        yield read


def _copy(target: torch.Tensor, read: Read, at: int, sizes: Sequence[int], boxes: Sequence[Overlap], most: int) -> None:
    """Read boxes of a tensor that is stored from byte `at` on into their places in `target`.

    sizes: of the stored tensor. most: the bytes between wanted ones that may be read too.
    """
    strides, width = [prod(sizes[dim + 1 :]) for dim in range(len(sizes))], target.element_size()
    if any(_gap(box, sizes) * width > most for box in boxes):
        boxes = [row for box in boxes for row in _rows(box, sizes)]
        reads = [[row] for row in boxes]
    else:
        reads = [list(boxes)] if boxes else []
    for group in reads:
        spans = [_span(box, strides) for box in group]
        start, stop = min(first for first, _ in spans), max(last for _, last in spans)
        content = torch.frombuffer(read(at + start * width, (stop - start) * width), dtype=target.dtype)
        for box, (first, _) in zip(group, spans, strict=True):
            _view(target, box).copy_(content.as_strided(box.sizes, strides, first - start))


def _inner(box: Overlap, sizes: Sequence[int]) -> int:
    """The dimension from which on the elements of a box are consecutive: all dimensions after it are whole."""
    return max((dim for dim in range(1, len(sizes)) if box.sizes[dim] != sizes[dim]), default=0)


def _gap(box: Overlap, sizes: Sequence[int]) -> int:
    """The most elements that are skipped between two of a box."""
    skipped = [(sizes[dim] - box.sizes[dim]) * prod(sizes[dim + 1 :]) for dim in range(1, len(sizes))]
    return max(skipped, default=0)


def _rows(box: Overlap, sizes: Sequence[int]) -> Iterator[Overlap]:
    """The parts of a box that are consecutive."""
    inner = _inner(box, sizes)
    for index in product(*(range(size) for size in box.sizes[:inner])):
        first, second = (
            tuple(start + i for start, i in zip(starts, [*index, *[0] * (len(sizes) - inner)], strict=True))
            for starts in (box.first, box.second)
        )
        yield Overlap(first, second, (*[1] * inner, *box.sizes[inner:]))


def _span(box: Overlap, strides: Sequence[int]) -> tuple[int, int]:
    """(first, after the last) element of a box in the stored tensor."""
    first = sum(start * stride for start, stride in zip(box.first, strides, strict=True))
    return first, first + 1 + sum((size - 1) * stride for size, stride in zip(box.sizes, strides, strict=True))


def _view(target: torch.Tensor, box: Overlap) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(box.second, box.sizes, strict=True)):
        target = target.narrow(dim, start, size)
    return target
