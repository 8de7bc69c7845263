"""Stop requests: a signal sets a flag, and a run reads the flag between its steps.

This module imports nothing slow, because the command installs its handlers before any other import.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# The exit code of a run that was stopped before its end and is saved; start it again. EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(SystemExit):
    """A run was asked to stop, and is saved. Ends the process, and with it a whole sweep, with exit code 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopRequest:
    """The signal that asks this process to stop: SIGTERM, SIGUSR1 (from a scheduler) or SIGINT (Ctrl-C).

    The first signal counts, later ones change nothing. Only SIGKILL ends a run before it is saved.

    began: when the run's processes began, in seconds of time.monotonic(), which all processes of a machine share.
    says: if true, each signal prints a line on stderr.
    """

    def __init__(self, began: float | None = None, says: bool = True) -> None:
        self.began = time.monotonic() if began is None else began
        self.signal_name: str | None = None
        self._says = says

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. It writes to the descriptor 2, because it may interrupt a write to sys.stderr."""
        name = signal.Signals(number).name
        if self.signal_name is None:
            self.signal_name = name
            line = f"{name}: stops after the step in progress, with everything saved"
        else:
            line = f"{name}: is stopping already since {self.signal_name}; only SIGKILL (kill -9) ends it at once"
        if self._says:
            with contextlib.suppress(OSError):
                os.write(2, f"sleeptrain: {line}\n".encode())


_current: StopRequest | None = None


def listen(request: StopRequest) -> StopRequest:
    """Send the signals of this process to `request` from now on. Must be called in the main thread."""
    global _current
    _current = request
    for number in SIGNALS:
        signal.signal(number, request.receive)
    return request


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """The current request of this process; if there is none, a new one that is current during the block."""
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or StopRequest()
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield listen(StopRequest())
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)


def is_main() -> bool:
    """True if this process has rank 0 of its launcher, or there is no launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
