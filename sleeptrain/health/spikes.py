"""Detect steps whose loss or gradient norm is far above those of the last steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# Standard deviation over median absolute deviation, of a normal distribution.
DEVIATION = 1.4826


class SpikeDetector:
    """Losses and gradient norms of the last `window` steps of one curriculum stage.

    factor: a spike is so many robust deviations above the median; 0: there are no spikes. There is no spike either
    before a stage has had `window` steps.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._stage: list[int] = []
        self._losses: list[float] = []
        self._norms: list[float] = []

    @property
    def watches(self) -> bool:
        return self._factor > 0

    def begin(self, stage: Sequence[int]) -> None:
        """Note the stage of the next step. A new stage clears the history."""
        if list(stage) != self._stage:
            self._stage, self._losses, self._norms = list(stage), [], []

    def spike(self, loss: float, norm: float) -> str | None:
        """A message about the loss or the gradient norm of a step if one is a spike; else None."""
        for name, value, history in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            if self.watches and len(history) == self._window and (distance := self._far_above(value, history)):
                return f"{name} {value:.4g} is {distance}"
        return None

    def observe(self, loss: float, norm: float) -> None:
        """Add a finite step, made or skipped. Spikes count too: a lasting new level is no spike after half a window."""
        if self.watches:
            self._losses = [*self._losses, loss][-self._window :]
            self._norms = [*self._norms, norm][-self._window :]

    def _far_above(self, value: float, history: Sequence[float]) -> str | None:
        median = statistics.median(history)
        deviation = DEVIATION * statistics.median(abs(x - median) for x in history)
        if value - median <= self._factor * deviation:
            return None
        times = f"{(value - median) / deviation:.1f} deviations" if deviation else "far"
        return f"{times} above {median:.4g}, the median of {self._window} steps"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; numbers only."""
        return {"stage": self._stage, "losses": self._losses, "norms": self._norms}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._stage, self._losses, self._norms = (list(saved[key]) for key in ("stage", "losses", "norms"))
