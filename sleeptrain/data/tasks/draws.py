"""Random integers for one row of a task: an endless sequence for each (seed, stream, number)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

from sleeptrain.data.philox import random_words

T = TypeVar("T")
WORDS_AT_ONCE = 128


class Draws:
    """The draws of row `number` of (seed, stream). Every row has its own 2^64 values of the counter.

    A draw below n is a scaled 64-bit word; its bias is less than n / 2^64.
    """

    def __init__(self, seed: int, stream: int, number: int) -> None:
        self._key = (seed, stream)
        self._counter = number << 64
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """A random integer of [0, bound)."""
        if not self._words:
            self._words = random_words(WORDS_AT_ONCE, *self._key, self._counter).tolist()
            self._counter += WORDS_AT_ONCE
        return self._words.pop() * bound >> 64

    def between(self, first: int, last: int) -> int:
        """A random integer of [first, last]."""
        return first + self.below(last - first + 1)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in a random order (Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def weighted(self, weights: Sequence[float]) -> int:
        """A random index, with probabilities in proportion to `weights`."""
        sums = list(accumulate(weights))
        point = sums[-1] * self.below(2**53) / 2**53
        return next(index for index, total in enumerate(sums) if point < total)
