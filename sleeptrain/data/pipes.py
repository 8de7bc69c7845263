"""Files that a shell command writes to its output."""

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
STDERR_SHOWN = 500  # characters at the end of what a failing command says

_running: set[subprocess.Popen[bytes]] = set()
_closing = threading.Event()


@contextlib.contextmanager
def open_pipe(url: str) -> Iterator[BinaryIO]:
    """The output of the command behind `pipe:`. Raises OSError with what the command says when it fails.

    The command runs in a session of its own: signals to this process's group, which the trainer answers by finishing
    its step, do not end a download on which that step waits. It ends when the block is left, or with this process.
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
    """Kill the command and what it started, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _running.discard(process)


def _stay_if_closing() -> None:
    """Keep a thread, whose command was ended by the closing interpreter, from trying again and from complaining."""
    if _closing.is_set() and threading.current_thread() is not threading.main_thread():
        threading.Event().wait()


@atexit.register
def _end_all() -> None:
    """Downloads ahead of need run in threads that the interpreter does not wait for."""
    _closing.set()
    for process in list(_running):
        _end(process)
