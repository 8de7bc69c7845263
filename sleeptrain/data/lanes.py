"""Cutting an epoch's token stream into lanes: pure arithmetic on positions, no data.

The documents of an epoch, put one after the other, are one stream of positions [0, E). What is left to read of it is a
list of spans. A cut lays the spans end to end and divides them into equal lanes, one a row; step s reads the positions
[s*T, s*T + T) of every lane. Cutting anew takes the unread tails of the lanes as the spans of the next cut.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np


class Cut:
    """`spans_S2` (int64, [begin, end) positions of the stream, none empty) in `rows` lanes, read `sequence` a step."""

    def __init__(self, spans_S2: np.ndarray, rows: int, sequence: int) -> None:
        self.rows = rows
        self._spans_S2 = spans_S2
        self._sequence = sequence
        # Laid end to end, span i covers the offsets [_bounds[i], _bounds[i + 1]).
        self._bounds = np.concatenate([[0], np.cumsum(spans_S2[:, 1] - spans_S2[:, 0])])
        # Lane lengths differ by one at most, so all lanes end at the same step, give or take one token.
        self._lane_bounds = np.arange(rows + 1, dtype=np.int64) * self._bounds[-1] // rows
        self.num_steps = -(-int(np.diff(self._lane_bounds).max()) // sequence)

    def step(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the stream and begins of their spans, both int64 [rows, 1 + T + 1], of step `index`.

        The first column is the lane's token before the step, the last one its token after it: what a row carries in and
        leaves behind. Where a lane has no such token both are -1.
        """
        begins_B1, ends_B1 = self._lane_bounds[:-1, None], self._lane_bounds[1:, None]
        offsets = begins_B1 + np.arange(-1, self._sequence + 1) + index * self._sequence
        inside = (begins_B1 <= offsets) & (offsets < ends_B1)
        spans = np.searchsorted(self._bounds, np.where(inside, offsets, 0), side="right") - 1
        span_begins = self._spans_S2[spans, 0]
        positions = span_begins + offsets - self._bounds[spans]
        return np.where(inside, positions, -1), np.where(inside, span_begins, -1)

    def unread(self, steps: int) -> np.ndarray:
        """The spans [S, 2] that are left after the first `steps` steps, lane by lane."""
        tails = [
            self._slice(min(begin + steps * self._sequence, end), end) for begin, end in pairwise(self._lane_bounds)
        ]
        return np.concatenate(tails)

    def _slice(self, begin: int, end: int) -> np.ndarray:
        """The spans of the offsets [begin, end)."""
        first = np.maximum(begin, self._bounds[:-1])
        last = np.minimum(end, self._bounds[1:])
        shift = self._spans_S2[:, 0] - self._bounds[:-1]
        return np.stack([first + shift, last + shift], axis=1)[first < last]
