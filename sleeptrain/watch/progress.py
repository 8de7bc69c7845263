"""Where a process is in its run: step, window, pass and phase, kept current as it works."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol


class Phase(StrEnum):
    """What a process is doing."""

    STARTING = "starting"
    READING = "reading"
    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    CHECKS = "checks"
    LOCATING = "locating what is not finite"
    EVALUATION = "evaluation"
    SAVING = "saving"
    ROLLBACK = "rollback"


# They may take long without any sign of progress.
LONG_PHASES = (Phase.STARTING, Phase.LOCATING, Phase.SAVING, Phase.ROLLBACK)


class WindowPass(Protocol):
    """A round as it is named in messages: window from 0, pass from 1."""

    @property
    def window(self) -> int: ...

    @property
    def pass_index(self) -> int: ...


class Location(NamedTuple):
    """step: counted from 1, None before the first. window, pass_index: of the round, counted from 1, None outside."""

    step: int | None
    phase: Phase
    window: int | None = None
    pass_index: int | None = None

    def __str__(self) -> str:
        if self.step is None:
            return "the start"
        parts = [f"step {self.step}"]
        if self.window is not None:
            parts += [f"window {self.window}", f"pass {self.pass_index}"]
        return ", ".join([*parts, self.phase])


class Progress:
    """Where this process is. Its main thread says so, at the cost of an assignment; others read `now` at any time.

    moves: how often it has been somewhere else. long: the phase may take long, or the process is in its first step,
    in which kernels are compiled.
    """

    def __init__(self) -> None:
        self._now = Location(None, Phase.STARTING)
        self._first_step: int | None = None
        self.moves = 0

    @property
    def now(self) -> Location:
        return self._now

    @property
    def long(self) -> bool:
        return self._now.phase in LONG_PHASES or self._now.step == self._first_step

    def begin_step(self, step: int) -> None:
        """The process reads the batch of a step, counted from 1."""
        if self._first_step is None:
            self._first_step = step
        self._move(Location(step, Phase.READING))

    def begin(self, phase: Phase) -> None:
        """A phase of the step begins, outside of all rounds."""
        self._move(Location(self._now.step, phase))

    def at(self, r: WindowPass, phase: Phase | None = None) -> None:
        """A round is run, in this phase or in the one that has begun."""
        self._move(Location(self._now.step, phase or self._now.phase, r.window + 1, r.pass_index))

    def _move(self, location: Location) -> None:
        self._now = location
        self.moves += 1
