"""Being told to stop: a signal sets a flag, the loop saves at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stopped(SystemExit):
    """A run ended early because it was asked to, and is saved. Ends the process with its code, a whole sweep too."""


class StopRequest:
    """Handles SIGTERM and SIGUSR1 (a scheduler's notice) and SIGINT while in use as a context manager.

    A second SIGINT interrupts at once, as a person at the keyboard expects; the checkpoint on disk stays whole.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
