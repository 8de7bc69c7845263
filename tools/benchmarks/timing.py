"""Comparable times: all candidates run in turn, in one process, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

METHOD = "one thread; candidates in turn in one process; CPU time of the process; the least of several rounds"


def round_robin(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU time of each candidate, in seconds: the least over the rounds, after a round of warm-up.

    Other processes can only add time. The alternation spreads the rest of their effect over all candidates.
    """
    least = dict.fromkeys(candidates, float("inf"))
    for counted in (False, *[True] * rounds):
        for name, candidate in candidates.items():
            start = time.process_time()
            candidate()
            seconds = time.process_time() - start
            if counted:
                least[name] = min(least[name], seconds)
    return least
