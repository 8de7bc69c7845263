"""Times that can be compared: all candidates in turn, in one process, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

METHOD = "one thread; candidates in turn in one process; CPU time of the process; the least of several rounds"


def round_robin(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time of each candidate: its least over the rounds, after a round that is not counted.

    Interference from other processes only ever adds time, and alternating spreads what is left of it over all.
    """
    least = dict.fromkeys(candidates, float("inf"))
    for counted in (False, *[True] * rounds):
        for name, candidate in candidates.items():
            start = time.process_time()
            candidate()
            taken = time.process_time() - start
            if counted:
                least[name] = min(least[name], taken)
    return least
