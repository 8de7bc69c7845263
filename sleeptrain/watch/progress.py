"""The progress of a process: its current step, window, pass and phase."""

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


# Phases that may take long without any sign of progress.
LONG_PHASES = (Phase.STARTING, Phase.LOCATING, Phase.SAVING, Phase.ROLLBACK)


class WindowPass(Protocol):
    """The window (from 0) and pass (from 1) of a round."""

    @property
    def window(self) -> int: ...

    @property
    def pass_index(self) -> int: ...


class Location(NamedTuple):
    """A place in a run.

    step: from 1; None before the first step. window, pass_index: of the round, from 1; None outside of rounds.
    """

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
    """The location of this process. The main thread sets it, by a cheap assignment; other threads may read it any time.

    now: the location. moves: how often the location was set. long: the phase may take long, or it is the first step,
    which compiles kernels.
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
        """Note that the process reads the batch of a step. step: from 1."""
        if self._first_step is None:
            self._first_step = step
        self._move(Location(step, Phase.READING))

    def begin(self, phase: Phase) -> None:
        """Note that a phase of the step begins, outside of rounds."""
        self._move(Location(self._now.step, phase))

    def at(self, r: WindowPass, phase: Phase | None = None) -> None:
        """Note that a round runs. phase: None: the current one."""
        self._move(Location(self._now.step, phase or self._now.phase, r.window + 1, r.pass_index))

    def _move(self, location: Location) -> None:
        self._now = location
        self.moves += 1
