"""Files that a shell command writes to its standard output."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

PIPE = "pipe:"
STDERR_SHOWN = 500  # characters at the end of a failing command's stderr

_running: set[subprocess.Popen[bytes]] = set()
_closing = threading.Event()


@contextlib.contextmanager
def open_pipe(url: str) -> Iterator[BinaryIO]:
    """The output of the command in a `pipe:` URL. Raises OSError with the command's stderr if the command fails.

    The command runs in its own session, so that signals to this process's group do not end it: the trainer finishes its
    step after such a signal, and the step may wait for the download. The command is killed at the end of the block or
    of this process.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            url.removeprefix(PIPE),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        _running.add(process)
        output = cast(BinaryIO, process.stdout)
        try:
            with output:
                yield output
            status = process.wait()
        finally:
            _end(process)
            _stay_if_closing()
        if status:
            raise OSError(f"exit status {status}: {_last_words(errors)}")


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    return " ".join(errors.read().decode(errors="replace").split())[-STDERR_SHOWN:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the command and its child processes, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _running.discard(process)


def _stay_if_closing() -> None:
    """Block a thread whose command was killed at interpreter exit, so that it neither retries nor logs an error."""
    if _closing.is_set() and threading.current_thread() is not threading.main_thread():
        threading.Event().wait()


@atexit.register
def _end_all() -> None:
    """Kill all running commands at interpreter exit, which does not wait for the threads of the prefetcher."""
    _closing.set()
    for process in list(_running):
        _end(process)
