"""Units of work. A process tokenises one unit at a time; the inputs alone decide the units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sleeptrain.prepare.inputs import Source
from sleeptrain.prepare.parquet import row_group_bytes

UNIT_BYTES = 64 * 2**20  # of text, about
PACKED = 4  # bytes of text per byte of a compressed file, about


@dataclass(frozen=True)
class Slice:
    """A part of a file.

    start, stop: in an uncompressed file of lines, the slice has the lines that begin in the bytes [start, stop); in a
        parquet file, the row groups [start, stop). Of any other file the slice is the whole file.
    weight: bytes of text, about.
    """

    source: Source
    start: int
    stop: int
    weight: int


@dataclass(frozen=True)
class Unit:
    """Consecutive slices of the corpus. number: the index of the unit in the corpus."""

    number: int
    slices: tuple[Slice, ...]

    @property
    def weight(self) -> int:
        return sum(part.weight for part in self.slices)

    @property
    def label(self) -> str:
        """The name of the unit in messages."""
        first, last = self.slices[0].source.name, self.slices[-1].source.name
        return f"unit {self.number} ({first})" if first == last else f"unit {self.number} ({first} to {last})"


def plan_units(sources: Sequence[Source], text_field: str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Units of about `unit_bytes` of text. Small files share a unit; large files are cut if their format allows it.

    Reads only the footers of parquet files. Raises DataError if one cannot be read.
    """
    groups: list[list[Slice]] = []
    weight = 0
    for part in _slices(sources, text_field, unit_bytes):
        if not groups or weight + part.weight > unit_bytes:
            groups.append([])
            weight = 0
        groups[-1].append(part)
        weight += part.weight
    return [Unit(number, tuple(slices)) for number, slices in enumerate(groups)]


def _slices(sources: Iterable[Source], text_field: str, unit_bytes: int) -> Iterator[Slice]:
    for source in sources:
        if source.kind == "parquet":
            for group, weight in enumerate(row_group_bytes(source, text_field)):
                yield Slice(source, group, group + 1, weight)
        elif source.compression:
            yield Slice(source, 0, source.size, PACKED * source.size)
        elif source.kind == "text":
            yield Slice(source, 0, source.size, source.size)
        else:
            for start in range(0, source.size, unit_bytes):
                stop = min(start + unit_bytes, source.size)
                yield Slice(source, start, stop, stop - start)
