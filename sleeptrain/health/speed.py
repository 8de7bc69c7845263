"""Find slow processes: each one times the same small work, without communication."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sleeptrain.distributed.world import World

# The shorter of two times counts: one disturbance does not make a process slow.
REPEATS = 2
# Size of square matrices; one product takes a few milliseconds. Products and loop last longer than a time slice of the
# operating system, so that a process that shares its core is seen to be slow.
SIZE = {"cpu": 384, "cuda": 4096}
PRODUCTS = 8
PYTHON_STEPS = 300_000


class Probe(NamedTuple):
    """Times of a process, in seconds.

    host: its hostname. device: for matrix products. python: for a loop of the interpreter.
    """

    host: str
    device: float
    python: float


def probe(device: torch.device) -> Probe:
    """Time this process alone."""
    size = SIZE[device.type]
    matrix = torch.ones(size, size, device=device)
    products, loops = [], []
    for _ in range(REPEATS):
        _finish(device)
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(matrix, matrix)
        _finish(device)
        products.append(time.perf_counter() - start)
        start = time.perf_counter()
        sum(i & 7 for i in range(PYTHON_STEPS))
        loops.append(time.perf_counter() - start)
    return Probe(socket.gethostname(), min(products), min(loops))


def compare_speeds(probes: Sequence[Probe], slow_factor: float) -> dict[str, object]:
    """A record of the median times in seconds, with "slow": each rank that took more than `slow_factor` medians.

    probes: by rank. For a slow rank the record has its host, and both times as multiples of the median. The median of
    two ranks is the faster one.
    """
    medians = {kind: statistics.median_low(getattr(p, kind) for p in probes) for kind in ("device", "python")}
    record: dict[str, object] = {f"{kind}_seconds": median for kind, median in medians.items()}
    slow = {}
    for rank, p in enumerate(probes):
        times = {kind: getattr(p, kind) / median for kind, median in medians.items()}
        if max(times.values()) > slow_factor:
            slow[f"rank{rank}"] = {"host": p.host, **times}
    return record | {"slow": slow}


def gathered_speeds(world: World, slow_factor: float) -> tuple[dict[str, object], list[str]]:
    """The record of all processes, and a line for each slow one. All processes call it."""
    record = compare_speeds(world.gather(probe(world.device)), slow_factor)
    slow = record["slow"]
    assert isinstance(slow, dict)
    lines = [
        f"{rank.replace('rank', 'rank ')} on {entry['host']} is slow: {entry['device']:.1f} times the median for "
        f"matrix products, {entry['python']:.1f} times for a loop of Python"
        for rank, entry in slow.items()
    ]
    return record, lines


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
