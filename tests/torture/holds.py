"""The signs that ranks of a tortured run give, and the places where they halt until a strike or a release."""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sleeptrain.checkpoint import saver
from sleeptrain.stop import StopRequest
from sleeptrain.watch.progress import Location, Phase, Progress

PHASES = tuple(Phase)
CHANGE = "change"
# Audit events of the interpreter before a change of the file system, and the number of path arguments.
EVENTS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1, "shutil.rmtree": 1}
MAX_RANKS = 8
# The process, the phase's number, whether it writes, the step, and the step in which it was asked to stop.
RANK = struct.Struct("iB?hh")
NEVER = -1


class Hold(NamedTuple):
    """A rank halts when, for the `number`th time of this attempt, it enters a phase or is about to change the disk."""

    rank: int
    what: str
    number: int


class Signs:
    """Memory that the ranks share with the test: the state of each rank that has started."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, RANK.size * MAX_RANKS)
        for rank in range(MAX_RANKS):
            RANK.pack_into(self._memory, RANK.size * rank, 0, 0, False, 0, NEVER)

    def _of(self, rank: int) -> tuple[int, int, bool, int, int]:
        return RANK.unpack_from(self._memory, RANK.size * rank)

    def process(self, rank: int) -> int | None:
        return self._of(rank)[0] or None

    def phase(self, rank: int) -> Phase:
        return PHASES[self._of(rank)[1]]

    @property
    def writing(self) -> bool:
        """Whether some rank is writing a checkpoint."""
        return any(self._of(rank)[2] for rank in range(MAX_RANKS))

    @property
    def stop_step(self) -> int | None:
        """The earliest step in which some rank was asked to stop, 0 before its first step; None if none was."""
        steps = [step for rank in range(MAX_RANKS) if (step := self._of(rank)[4]) != NEVER]
        return min(steps, default=None)

    def set_process(self, rank: int, process: int) -> None:
        struct.pack_into("i", self._memory, RANK.size * rank, process)

    def set_phase(self, rank: int, phase: Phase) -> None:
        self._memory[RANK.size * rank + 4] = PHASES.index(phase)

    def set_step(self, rank: int, step: int) -> None:
        struct.pack_into("h", self._memory, RANK.size * rank + 6, step)

    def set_stop(self, rank: int) -> None:
        """Record the step of the first request to stop."""
        if self._of(rank)[4] == NEVER:
            struct.pack_into("h", self._memory, RANK.size * rank + 8, self._of(rank)[3])

    def set_writing(self, rank: int, writing: bool) -> None:
        self._memory[RANK.size * rank + 5] = writing


def own_rank(size: int) -> int:
    """-1 in the process that only starts the others."""
    return int(os.environ.get("RANK", 0 if size == 1 else -1))


def install(run_folder: Path, size: int, signs: Signs, hold: Hold | None, report: Path) -> None:
    """In the process that forks the ranks, make them give signs. report: the file that names a halted process."""
    halt = _Halt(size, hold, report)
    move, write, receive = Progress._move, saver.write, StopRequest.receive

    def moved(self: Progress, location: Location) -> None:
        move(self, location)
        signs.set_phase(own_rank(size), location.phase)
        signs.set_step(own_rank(size), location.step or 0)
        halt.passing(location.phase, location.phase)

    def written(*arguments: Any) -> None:
        signs.set_writing(own_rank(size), True)
        try:
            write(*arguments)
        finally:
            signs.set_writing(own_rank(size), False)

    def received(self: StopRequest, *signal_and_frame: Any) -> None:
        receive(self, *signal_and_frame)
        if (rank := own_rank(size)) >= 0:
            signs.set_stop(rank)

    StopRequest.receive = received  # type: ignore[method-assign]
    Progress._move = moved  # type: ignore[method-assign]
    saver.write = written
    if hold is not None and hold.what == CHANGE:
        _before_changes(run_folder, halt.passing)


class _Halt:
    def __init__(self, size: int, hold: Hold | None, report: Path) -> None:
        self._size, self._hold, self._report = size, hold, report
        self._count, self._lock = 0, threading.RLock()

    def passing(self, what: str, where: str) -> None:
        if self._hold is None or what != self._hold.what or own_rank(self._size) != self._hold.rank:
            return
        with self._lock:
            self._count += 1
            if self._count != self._hold.number:
                return
        descriptor = os.open(self._report, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "where": where}).encode() + b"\n")
        # The signal goes to this thread, so that it does not get a step further; the others stop with it.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _before_changes(folder: Path, passing: Callable[[str, str], None]) -> None:
    """Call `halt` before every change, also a sync, that this process and its forks make to the run's folder."""
    place, plain_sync = str(folder), os.fsync

    def sync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.startswith(place):
            passing(CHANGE, f"fsync {Path(name).name}")
        plain_sync(descriptor)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            paths = arguments[:1] if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
        elif event in EVENTS:
            paths = arguments[: EVENTS[event]]
        else:
            return
        inside = [str(path) for path in paths if isinstance(path, str | os.PathLike) and str(path).startswith(place)]
        if inside and "/wandb" not in inside[0]:
            passing(CHANGE, f"{event} {Path(inside[0]).name}")

    os.fsync = sync
    sys.addaudithook(audit)
