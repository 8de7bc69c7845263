"""A parallel layout as numbers, for tests that try several."""

from __future__ import annotations

import math
from typing import NamedTuple


class Layout(NamedTuple):
    tensor: int
    pipeline: int
    data: int
    zero: int

    @property
    def size(self) -> int:
        """The number of processes."""
        return math.prod(self[:3])

    def settings(self) -> tuple[str, ...]:
        return (f"parallel.tensor={self.tensor}", f"parallel.pipeline={self.pipeline}", f"parallel.zero={self.zero}")
