"""How much of each source is due: weighted fair queueing on whole documents, in exact integers.

A row of the batch has a clock that counts tokens. By clock time t source k is owed Q_k(t) tokens: its weight times t,
stage by stage where weights change. A document that begins at position x of the source's lane is due at the first time
at which more than x tokens are owed, and a row reads documents in the order in which they are due. So the share of a
source never strays from what it is owed by more than one document a row, however long the run is; no document is
interrupted; and what a row has read by any time follows from the time alone.
A. Demers, S. Keshav and S. Shenker, "Analysis and simulation of a fair queueing algorithm", SIGCOMM 1989.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from sleeptrain.errors import ConfigError

NEVER = np.iinfo(np.int64).max
# time * numerator must fit 63 bits: a row of 10**12 tokens and weights of six digits do.
LARGEST_DENOMINATOR = 10**6


def shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Each weight's share of their sum, exactly as the decimals were written.

    Raises ConfigError where none is above zero, or their common denominator is larger than a million.
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
    """Q_k of one source. starts: clock times at which stages begin, the first 0; shares: of the source in each stage.

    lead: tokens by which the source's first document is late, so that rows do not all turn to a source at once.
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
        """The last time t with Q_k(t) <= position, of each position: int64, NEVER where it is not due at any time."""
        stages = np.searchsorted(self._owed, positions, side="right") - 1
        # A stage in which nothing is owed ends with what it began with, so that the search steps over it.
        stages = np.maximum(stages, 0)
        numerators, denominators = self._numerators[stages], self._denominators[stages]
        missing = positions - self._owed[stages] + 1
        never = numerators == 0
        times = self._starts[stages] - (-missing * denominators // np.where(never, 1, numerators)) - 1
        return np.where(never, NEVER, times)
