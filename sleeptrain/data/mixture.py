"""Quotas of the sources in a mixture: weighted fair queueing on whole documents, in exact integers.

A row of the batch has a clock that counts tokens. At clock time t source k is owed Q_k(t) tokens: its share times t,
summed over the stages if weights change. A document that begins at position x of the source's lane is due at the first
time at which more than x tokens are owed. A row reads documents in the order in which they are due. It follows that

- the tokens read of a source differ from Q_k by at most one document a row, however long the run is;
- no document is interrupted;
- the documents that a row has read depend on the time only.

A. Demers, S. Keshav and S. Shenker, "Analysis and simulation of a fair queueing algorithm", SIGCOMM 1989.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from sleeptrain.errors import ConfigError

NEVER = np.iinfo(np.int64).max
# time * numerator must fit into 63 bits: 10**12 tokens of a row and weights of six digits do.
LARGEST_DENOMINATOR = 10**6


def shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Each weight divided by the sum of all, as exact fractions of the decimal numbers.

    Raises ConfigError if a weight is negative, no weight is above zero, or the common denominator is above a million.
    """
    exact = {name: Fraction(repr(float(weight))) for name, weight in weights.items()}
    total = sum(exact.values())
    if not total or min(exact.values()) < 0:
        raise ConfigError(f"data.shards: the weights {dict(weights)} must not be negative, and one must be above 0")
    result = {name: weight / total for name, weight in exact.items()}
    if lcm(*(share.denominator for share in result.values())) > LARGEST_DENOMINATOR:
        raise ConfigError(f"data.shards: the weights {dict(weights)} are too fine; give each at most five digits")
    return result


class Quota:
    """Q_k of one source.

    starts: clock times at which stages begin, the first 0.
    shares: the source's share in each stage.
    lead: delay of the source's first document, in tokens of the source, so that not all rows read a source at once.
    """

    def __init__(self, starts: Sequence[int], shares: Sequence[Fraction], lead: int = 0) -> None:
        self._starts = np.array(starts, np.int64)
        self._numerators = np.array([share.numerator for share in shares], np.int64)
        self._denominators = np.array([share.denominator for share in shares], np.int64)
        spans = np.diff(self._starts)
        gains = spans * self._numerators[:-1] // self._denominators[:-1]
        self._owed = np.concatenate([[0], np.cumsum(gains)]) - lead  # at the start of each stage

    def owed(self, time: int) -> int:
        """Q_k(t), at least 0."""
        stage = int(np.searchsorted(self._starts, time, side="right")) - 1
        gain = (time - int(self._starts[stage])) * int(self._numerators[stage]) // int(self._denominators[stage])
        return max(0, int(self._owed[stage]) + gain)

    def due(self, positions: np.ndarray) -> np.ndarray:
        """The last time t with Q_k(t) <= position, for each position: int64, NEVER if a position is never due."""
        stages = np.searchsorted(self._owed, positions, side="right") - 1
        # A stage with share 0 has the same owed tokens at its start and end, so the search skips it.
        stages = np.maximum(stages, 0)
        numerators, denominators = self._numerators[stages], self._denominators[stages]
        missing = positions - self._owed[stages] + 1
        never = numerators == 0
        times = self._starts[stages] - (-missing * denominators // np.where(never, 1, numerators)) - 1
        return np.where(never, NEVER, times)
