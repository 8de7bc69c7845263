"""Making the checks: most at the same time, those that use the machine's GPUs one after the other."""

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
class Lane:
    """Checks that wait for each other: groups of them, and the crew that is at work on the first."""

    groups: list[list[str]]
    crew: WorkerPool | None = field(default=None, init=False)


def examine(names: Sequence[str], case: Case) -> Generator[Result, None, None]:
    """The results of these checks as they come. No process is left when this ends, however it does.

    case: its folder is not used; that of each crew is made under the temporary folder.
    """
    alone = [name for name in names if name not in ON_DEVICE + OF_RANKS + OF_TEXT]
    device, ranks, text = ([name for name in group if name in names] for group in (ON_DEVICE, OF_RANKS, OF_TEXT))
    lanes = [*(Lane([[name]]) for name in alone), Lane([text] if text else []), Lane([g for g in (device, ranks) if g])]
    with tempfile.TemporaryDirectory(prefix="sleeptrain-doctor-") as folder, _ending_when_told():
        try:
            yield from _run(lanes, case, Path(folder))
        finally:
            for lane in lanes:
                if lane.crew is not None:
                    lane.crew.end()


def _run(lanes: Sequence[Lane], case: Case, folder: Path) -> Iterator[Result]:
    numbers, devices = count(), 0

    def occupy(lane: Lane) -> None:
        lane.crew = None
        if lane.groups:
            group = lane.groups[0]
            size = (devices or CPU_RANKS) if group[0] in OF_RANKS else 1
            lane.crew = WorkerPool(group, replace(case, folder=folder / str(next(numbers))), size)

    for lane in lanes:
        occupy(lane)
    while busy := [lane for lane in lanes if lane.crew is not None]:
        _listen([lane.crew for lane in busy if lane.crew is not None])
        for lane in busy:
            assert lane.crew is not None
            left = lane.crew.left
            for result in lane.crew.results():
                devices = result.finding.details.get("devices", devices) if result.name == "torch" else devices
                yield result
                if result.name == MEETING and result.finding.state == FAILED:
                    yield from (Result(name, skipped(UNMET), 0.0) for name in left)
                    left.clear()
            if lane.crew.over:
                lane.groups = [group for group in (left, *lane.groups[1:]) if group]
                lane.crew.end()
                occupy(lane)


def _listen(crews: Sequence[WorkerPool]) -> None:
    """Until one of them says something, ends, or has used up its time."""
    places: Mapping[int, tuple[WorkerPool, int]] = {
        pipe: (crew, rank) for crew in crews for pipe, rank in crew.pipes().items()
    }
    left = min(crew.deadline for crew in crews) - time.monotonic()
    ready, _, _ = select.select(list(places), [], [], max(left, 0.0))
    for pipe in ready:
        crew, rank = places[pipe]
        crew.hear(rank)


@contextmanager
def _ending_when_told() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that the processes are ended."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
