"""The pieces of documents that one row of the batch reads, from all sources, in the order in which they are due.

A call depends on no earlier call; only a cache is kept. The state of a row after any number of tokens is computed from
the sources' shares and the documents near that position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sleeptrain.data.lanes import Lane
from sleeptrain.data.mixture import NEVER, Quota

# A piece in a row. begin: row position; size: number of positions; source: number of the source; line: line position of
# its first token; offset: tokens of the document in front of this piece; length: tokens.
ROW_PIECE = np.dtype(
    [(name, "i8") for name in ("begin", "size", "line", "offset", "length")]
    + [(name, "i4") for name in ("source", "shard", "index")]
)
STRETCH = 2**20  # clock time of a stretch, at most
EPOCHS = 64  # epochs of the source with the shortest lane in a stretch, at most


@dataclass(frozen=True)
class Stretch:
    """The pieces that are due in one stretch of the clock.

    number: number of the stretch. begin, end: row positions of the stretch, [begin, end).
    pieces: ROW_PIECE [P]. begins, ends: row positions of each piece, int64 [P].
    """

    number: int
    begin: int
    end: int
    pieces: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Row:
    """One row since the last cut: a lane and a quota for each source."""

    def __init__(self, lanes: Sequence[Lane], quotas: Sequence[Quota]) -> None:
        self._lanes = lanes
        self._quotas = quotas
        self._stretch = min(STRETCH, EPOCHS * min(lane.epoch_size for lane in lanes))
        self._latest: Stretch | None = None

    def pieces(self, begin: int, end: int) -> np.ndarray:
        """The pieces that overlap the row positions [begin, end), uncut, in order: ROW_PIECE [P]."""
        stretch = self._stretch_at(begin)
        parts = []
        while True:
            first = stretch.ends.searchsorted(begin, side="right")
            parts.append(stretch.pieces[first : stretch.begins.searchsorted(end)])
            if end <= stretch.end:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            stretch = self._plan(stretch.number + 1)

    def read(self, position: int) -> list[int]:
        """The number of lane positions of each source that the row has read at a row position."""
        stretch = self._stretch_at(position)
        before = stretch.pieces[stretch.pieces["begin"] < position]
        sizes = np.minimum(before["size"], position - before["begin"])
        gains = np.bincount(before["source"], sizes, minlength=len(self._lanes)).astype(np.int64)
        return [start + int(gain) for start, gain in zip(self._starts(stretch.number), gains, strict=True)]

    def _stretch_at(self, position: int) -> Stretch:
        stretch = self._latest
        if stretch is not None and stretch.begin <= position < stretch.end:
            return stretch
        # The row is ahead of the clock by parts of documents at most, so this guess is near and mostly right.
        number = position // self._stretch if stretch is None or position < stretch.begin else stretch.number + 1
        while number and self._begin(number) > position:
            number = max(0, number - max(1, (self._begin(number) - position) // self._stretch))
        while self._begin(number + 1) <= position:
            number += 1
        return self._plan(number)

    def _begin(self, number: int) -> int:
        """The row position at which a stretch begins."""
        return sum(self._starts(number))

    def _starts(self, number: int) -> list[int]:
        """Each source's lane position at which a stretch begins."""
        owed = [quota.owed(number * self._stretch) for quota in self._quotas]
        return [lane.next_begin(position) for lane, position in zip(self._lanes, owed, strict=True)]

    def _plan(self, number: int) -> Stretch:
        starts, ends = self._starts(number), self._starts(number + 1)
        parts, dues = [], []
        for source, (lane, quota) in enumerate(zip(self._lanes, self._quotas, strict=True)):
            if starts[source] < ends[source]:  # fetch nothing of a source with weight zero
                lane.prefetch(starts[source])
            lane_pieces = lane.pieces(starts[source], ends[source])
            part = np.empty(len(lane_pieces), ROW_PIECE)
            for name in ("size", "line", "offset", "length", "shard", "index"):
                part[name] = lane_pieces[name]
            part["source"] = source
            parts.append(part)
            dues.append(quota.due(lane_pieces["begin"]))
        pieces, due = np.concatenate(parts), np.concatenate(dues)
        assert not (due == NEVER).any()
        pieces = pieces[np.argsort(due, kind="stable")]  # equal times: in the order of the sources
        row_ends = sum(starts) + np.cumsum(pieces["size"])
        begins = row_ends - pieces["size"]
        pieces["begin"] = begins
        stretch = Stretch(number, sum(starts), sum(ends), pieces, begins, row_ends)
        self._latest = stretch  # a cache for the next call, by any thread
        return stretch
