"""Run the checks: most at the same time, the checks that use the GPUs one after the other."""

from __future__ import annotations

import select
import signal
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import FrameType

from sleeptrain.doctor.checks import CPU_RANKS, MEETING, OF_RANKS, OF_TEXT, ON_DEVICE
from sleeptrain.doctor.finding import FAILED, Case, Result, skipped
from sleeptrain.doctor.worker_pool import WorkerPool

UNMET = f"the processes do not meet ({MEETING})"


@dataclass
class CheckQueue:
    """Checks that run one after the other.

    groups: names of checks; the checks of a group share their processes.
    pool: the processes that run the first group.
    """

    groups: list[list[str]]
    pool: WorkerPool | None = field(default=None, init=False)


def examine(names: Sequence[str], case: Case) -> Generator[Result, None, None]:
    """Yield each result as soon as it is there. When the generator ends or is closed, all processes have ended.

    case: its `folder` is not used; each pool gets a new folder inside a temporary one.
    """
    alone = [name for name in names if name not in ON_DEVICE + OF_RANKS + OF_TEXT]
    device, ranks, text = ([name for name in group if name in names] for group in (ON_DEVICE, OF_RANKS, OF_TEXT))
    queues = [
        *(CheckQueue([[name]]) for name in alone),
        CheckQueue([text] if text else []),
        CheckQueue([g for g in (device, ranks) if g]),
    ]
    with tempfile.TemporaryDirectory(prefix="sleeptrain-doctor-") as folder, _exit_on_sigterm():
        try:
            yield from _run(queues, case, Path(folder))
        finally:
            for queue in queues:
                if queue.pool is not None:
                    queue.pool.end()


def _run(queues: Sequence[CheckQueue], case: Case, folder: Path) -> Iterator[Result]:
    numbers, devices = count(), 0

    def start_next(queue: CheckQueue) -> None:
        queue.pool = None
        if queue.groups:
            group = queue.groups[0]
            size = (devices or CPU_RANKS) if group[0] in OF_RANKS else 1
            queue.pool = WorkerPool(group, replace(case, folder=folder / str(next(numbers))), size)

    for queue in queues:
        start_next(queue)
    while busy := [queue for queue in queues if queue.pool is not None]:
        _listen([queue.pool for queue in busy if queue.pool is not None])
        for queue in busy:
            assert queue.pool is not None
            remaining = queue.pool.remaining
            for result in queue.pool.results():
                devices = result.finding.details.get("devices", devices) if result.name == "torch" else devices
                yield result
                if result.name == MEETING and result.finding.state == FAILED:
                    yield from (Result(name, skipped(UNMET), 0.0) for name in remaining)
                    remaining.clear()
            if queue.pool.finished:
                queue.groups = [group for group in (remaining, *queue.groups[1:]) if group]
                queue.pool.end()
                start_next(queue)


def _listen(pools: Sequence[WorkerPool]) -> None:
    """Wait until a worker sends a finding, a worker ends, or the time of a pool is over. Read the findings."""
    workers: Mapping[int, tuple[WorkerPool, int]] = {
        pipe: (pool, rank) for pool in pools for pipe, rank in pool.pipes().items()
    }
    seconds = min(pool.deadline for pool in pools) - time.monotonic()
    ready, _, _ = select.select(list(workers), [], [], max(seconds, 0.0))
    for pipe in ready:
        pool, rank = workers[pipe]
        pool.read(rank)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that the `finally` clauses end the processes, as after Ctrl-C."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
