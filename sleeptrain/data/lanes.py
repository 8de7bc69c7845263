"""Lanes: they divide the line of a source among the rows of a batch, so that each row continues where it stopped.

Every epoch is cut into as many contiguous lanes as a batch has rows. A row reads its lane of one epoch, then its lane
of the next. When the number of rows changes, the unread spans are laid end to end and cut again; they are read first.

There are two coordinates. A *line* position counts the positions of the source. A *lane* position counts the positions
of the source that one row has read since the last cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from sleeptrain.data.order import DOCUMENT, Line

# A document, or the part of it in one lane. begin: lane position. line: line position of its first token. size: number
# of positions. offset: tokens of the document in front of this part. length: tokens of this part.
PIECE = np.dtype(
    [(name, "i8") for name in ("begin", "line", "size", "offset", "length")] + [("shard", "i4"), ("index", "i4")]
)


class Span(NamedTuple):
    """The line positions [begin, end); `lane` is the lane position of `begin`."""

    lane: int
    begin: int
    end: int


class Cut:
    """The line of a source, cut into `rows` lanes: the unread `spans` first, then whole epochs from `first_epoch` on.

    spans: (begin, end) line positions, none empty. All lengths are multiples of `unit`. The lengths of an epoch's lanes
    differ by one unit at most.
    """

    def __init__(
        self,
        epoch_size: int,
        rows: int,
        unit: int = 1,
        spans: Sequence[tuple[int, int]] = (),
        first_epoch: int = 0,
    ) -> None:
        self.rows = rows
        self._epoch_size = epoch_size
        self._first_epoch = first_epoch
        self._bounds = _equal_parts(epoch_size, rows, unit)
        self._spans = spans
        # Laid end to end, span i of the leftovers covers the offsets [_ends[i], _ends[i + 1]).
        self._ends = list(accumulate((end - begin for begin, end in spans), initial=0))
        self._leftover_bounds = _equal_parts(self._ends[-1], rows, unit)

    def lane(self, row: int, begin: int, end: int) -> Iterator[Span]:
        """The spans of row `row` that overlap the lane positions [begin, end), uncut, in order."""
        for span in self._leftovers(row):
            if span.lane < end and begin < span.lane + span.end - span.begin:
                yield span
        leftover, length = self._leftover(row), self.length(row)
        epoch = max(0, begin - leftover) // length
        while (lane := leftover + epoch * length) < end:
            start = (self._first_epoch + epoch) * self._epoch_size
            yield Span(lane, start + self._bounds[row], start + self._bounds[row + 1])
            epoch += 1

    def unread(self, read_B: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
        """(unread spans of the begun epochs, number of the first epoch after them), if row b has read `read_B[b]`.

        read_B: lane positions. The spans are in the order of the epochs, then of the rows.
        """
        begun = max(self._epochs_begun(row, read) for row, read in enumerate(read_B))
        spans: list[tuple[int, int]] = []
        for row, read in enumerate(read_B):
            end = self._leftover(row) + begun * self.length(row)
            spans += [(span.begin + max(0, read - span.lane), span.end) for span in self.lane(row, read, end)]
        return sorted(spans, key=lambda span: span[0] // self._epoch_size), self._first_epoch + begun

    def length(self, row: int) -> int:
        """Positions of the row's lane in a whole epoch."""
        return self._bounds[row + 1] - self._bounds[row]

    def _leftover(self, row: int) -> int:
        """Positions of the row's lane in the unread spans, before the first whole epoch."""
        return self._leftover_bounds[row + 1] - self._leftover_bounds[row]

    def _epochs_begun(self, row: int, read: int) -> int:
        return -(-max(0, read - self._leftover(row)) // self.length(row))

    def _leftovers(self, row: int) -> Iterator[Span]:
        first, last = self._leftover_bounds[row], self._leftover_bounds[row + 1]
        index = bisect_right(self._ends, first) - 1
        while first < last:
            stop = min(last, self._ends[index + 1])
            begin = self._spans[index][0] + first - self._ends[index]
            yield Span(first - self._leftover_bounds[row], begin, begin + stop - first)
            first, index = stop, index + 1


class Lane:
    """One row's lane of one source, in pieces of documents."""

    def __init__(self, line: Line, cut: Cut, row: int) -> None:
        self._line = line
        self._cut = cut
        self._row = row
        self._prefetched = range(0)  # lane positions whose shards have been requested

    @property
    def epoch_size(self) -> int:
        """Positions of the lane in a whole epoch."""
        return self._cut.length(self._row)

    def pieces(self, begin: int, end: int) -> np.ndarray:
        """The pieces that begin at the lane positions [begin, end), in order: PIECE [P]."""
        parts = [np.empty(0, PIECE)]
        for span in self._cut.lane(self._row, begin, end):
            first, last = max(span.begin, span.begin + begin - span.lane), min(span.end, span.begin + end - span.lane)
            documents = self._line.documents(first, last)
            if begin <= span.lane and (not len(documents) or documents["begin"][0] > span.begin):
                first_document = np.array([self._line.document_at(span.begin)], DOCUMENT)
                documents = np.concatenate([first_document, documents])
            parts.append(_clip(documents, span))
        return np.concatenate(parts)

    def next_begin(self, position: int) -> int:
        """The first lane position, from `position` on, at which a piece begins."""
        span = next(self._cut.lane(self._row, position, position + 1))
        if position == span.lane:
            return position
        following = self._line.next_begin(span.begin + position - span.lane)
        return span.lane + min(following, span.end) - span.begin

    def prefetch(self, position: int) -> None:
        """Request, once, the shards of the group at lane position `position` and of the next group in this lane."""
        if position in self._prefetched:
            return
        span = next(self._cut.lane(self._row, position, position + 1))
        current = span.begin + position - span.lane
        following = min(self._line.group_end(current), span.end)
        self._prefetched = range(position, span.lane + following - span.begin)
        if following == span.end:
            following = next(self._cut.lane(self._row, self._prefetched.stop, self._prefetched.stop + 1)).begin
        self._line.prefetch(current)
        self._line.prefetch(following)


def _clip(documents: np.ndarray, span: Span) -> np.ndarray:
    """The parts of `documents` that lie in `span`: DOCUMENT [P] -> PIECE [P]."""
    pieces = np.empty(len(documents), PIECE)
    pieces["line"] = np.maximum(documents["begin"], span.begin)
    pieces["begin"] = pieces["line"] - span.begin + span.lane
    pieces["size"] = np.minimum(documents["begin"] + documents["size"], span.end) - pieces["line"]
    pieces["offset"] = pieces["line"] - documents["begin"]
    pieces["length"] = np.minimum(documents["length"] - pieces["offset"], pieces["size"])
    pieces["shard"], pieces["index"] = documents["shard"], documents["index"]
    return pieces


def _equal_parts(size: int, parts: int, unit: int) -> list[int]:
    """The bounds of `parts` contiguous parts of [0, size), in multiples of `unit`."""
    return [part * (size // unit) // parts * unit for part in range(parts + 1)]
