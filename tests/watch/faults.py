"""Runs with a fault on one rank, at one place of its step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sleeptrain.watch.failure_detector import FailureDetector
from sleeptrain.watch.heartbeat import Alarm, Heartbeat
from sleeptrain.watch.progress import Location, Phase, Progress


@dataclass(frozen=True)
class Fault:
    """rank, location: the place of the fault. what: kill | stop | raise | loop | hold (for `seconds`, then go on).

    folder: where the watching ranks record that they have seen the rank at its place. stall: seconds without progress
    that count as a standstill. They count after the rank is at its place and the others have reached its step; before
    that nothing is a standstill, however slow the machine.
    """

    rank: int
    location: Location
    what: str
    folder: str
    seconds: float = 0.0
    stall: int = 0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Fault:
        fields = json.loads(text)
        step, phase, *others = fields.pop("location")
        return Fault(location=Location(step, Phase(phase), *others), **fields)


def install(fault: Fault) -> None:
    """Install the fault in this process, which knows its rank from the environment when it reaches the place."""
    move, look, struck = Progress._move, FailureDetector.look, list[bool]()

    def moved(self: Progress, location: Location) -> None:
        move(self, location)
        if location == fault.location and int(os.environ["RANK"]) == fault.rank and not struck:
            struck.append(True)
            strike(fault)

    def looked(self: FailureDetector, beats: Sequence[Heartbeat | None], seconds: float) -> Alarm | None:
        victim = beats[fault.rank]
        there = victim is not None and victim.location == fault.location
        if fault.stall:
            come = all(b is not None and (b.location.step or 0) >= (fault.location.step or 0) for b in beats)
            self._settings = replace(self._settings, stall_after=fault.stall if there and come else 0)
        alarm = look(self, beats, seconds)
        if there:
            seen_by(fault, int(os.environ["RANK"])).touch()
        return alarm

    Progress._move = moved  # type: ignore[method-assign]
    FailureDetector.look = looked  # type: ignore[method-assign]


def seen_by(fault: Fault, rank: int) -> Path:
    return Path(fault.folder, f"seen-by-{rank}")


def strike(fault: Fault) -> Any:
    if fault.what == "hold":
        return time.sleep(fault.seconds)
    if fault.what == "raise":
        raise ValueError("a mistake of this rank alone")
    if fault.what == "loop":
        while True:
            time.sleep(0.01)
    # Rank 0 watches all, and the others watch rank 0.
    watching = range(1, int(os.environ["WORLD_SIZE"])) if fault.rank == 0 else [0]
    while not all(seen_by(fault, rank).exists() for rank in watching):
        time.sleep(0.01)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault.what])
    return None


if "SLEEPTRAIN_TEST_FAULT" in os.environ:  # a new process
    install(Fault.decode(os.environ["SLEEPTRAIN_TEST_FAULT"]))
