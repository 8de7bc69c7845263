"""Being asked to stop: a signal sets a flag, which a run looks at between its steps.

Imports nothing heavy: the command listens before it loads anything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# The exit code of a run that was stopped before its end and is saved: start it again (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(SystemExit):
    """A run ended early because it was asked to, and is saved. Ends the process with its code, a whole sweep too."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopRequest:
    """Whether a signal has asked this process to stop: SIGTERM, SIGUSR1 (a scheduler's notice) or SIGINT (Ctrl-C).

    The first one counts. Later ones change nothing: only SIGKILL ends a run before it is saved. began: when the run's
    processes began (time.monotonic(), which the processes of a machine share). says: whether each signal is answered by
    a line on stderr.
    """

    def __init__(self, began: float | None = None, says: bool = True) -> None:
        self.began = time.monotonic() if began is None else began
        self.signal_name: str | None = None
        self._says = says

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. It writes to the descriptor: it may have interrupted a write to sys.stderr."""
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
    """From now on signals to this process are `request`'s, to its end. In the main thread."""
    global _current
    _current = request
    for number in SIGNALS:
        signal.signal(number, request.receive)
    return request


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """The request of a process that listens already; else a new one for the length of the block."""
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
    """Whether a launcher made this process the first of its run, or there is no launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
