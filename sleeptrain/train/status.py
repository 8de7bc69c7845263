"""`status.json` in the run folder: the state of a run, for scripts that restart it. A launcher hides exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

from sleeptrain.errors import DataError, LeaseError, UserError, exit_code, format_error
from sleeptrain.files import write_whole
from sleeptrain.kinds import is_count, is_time
from sleeptrain.lease import Lease
from sleeptrain.small_files import SETTINGS_BYTES, parse_json, read_bounded
from sleeptrain.stop import EXIT_STOPPED, Stopped
from sleeptrain.terminal import say
from sleeptrain.train.attempt import Attempt

FILE = "status.json"
# The least time between two writes of progress, in seconds.
INTERVAL = 10.0


class State(StrEnum):
    """The state of a run. A killed run stays RUNNING: it had no time to change that."""

    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


CODES = {State.STOPPED: EXIT_STOPPED, State.FINISHED: 0}


class Status:
    """The status file of a run.

    writes: True if this process writes the file; in other processes nothing is written.
    lease: the lease on the run folder; nothing is written while another process has it.
    Until `begin`, the fields are those of the attempt before. Only the first `end` of an attempt is written.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self._path, self.writes = folder / FILE, writes
        self.lease = Lease(folder, f"{folder} is being trained", "choose another run.name")
        self.read()
        self._begun = False
        self._lock = threading.Lock()  # the watch may end the run from its own thread
        self._ended = False
        self._written = 0.0

    def read(self) -> None:
        """Read the fields from the file, which another attempt may have changed."""
        fields = {"step": 0, "tokens": 0, "attempt": None, "progress_at": None, "save_seconds": 0.0}
        self._fields: dict[str, Any] = read_status(self._path.parent) or fields

    @property
    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 if there was none."""
        attempt = self._fields["attempt"]
        return attempt["number"] if attempt else 0

    @property
    def save_seconds(self) -> float:
        """The longest time that saving a checkpoint has taken in any attempt, in seconds."""
        return float(self._fields.get("save_seconds", 0.0))

    def begin(self, attempt: Attempt, step: int, tokens: int) -> None:
        """Write the start of an attempt, which begins at `step`."""
        self._fields |= {"step": step, "tokens": tokens, "attempt": asdict(attempt), "progress_at": time.time()}
        self._begun = True
        self._write(State.RUNNING)

    def progress(self, step: int, tokens: int, save_seconds: float) -> None:
        """Record a step; written at most every INTERVAL seconds. save_seconds: this attempt's longest save."""
        self._fields |= {"step": step, "tokens": tokens, "progress_at": time.time()}
        self._fields["save_seconds"] = max(save_seconds, self.save_seconds)
        if time.monotonic() - self._written > INTERVAL:
            self._write(State.RUNNING)

    def end(self, state: State, reason: str | None = None, code: int | None = None) -> None:
        """Write the end of the attempt. code: the exit code of a failure.

        A failure before `begin` is written only if the run folder was there before: a refused start makes no folder.
        """
        has_folder = os.path.isdir(self._path.parent)  # Path.is_dir can raise
        if state is not State.FAILED or self._begun or (has_folder and not self.lease.made_folder):
            self._write(state, reason, CODES.get(state, code))

    def end_of_killed(self, reason: str, code: int) -> None:
        """Write a failure if the file says that the run is running: the process that wrote the file was killed."""
        if self._fields.get("state") == State.RUNNING:
            self.end(State.FAILED, reason, code)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Write a failure if an error leaves the block."""
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            self.end(State.FAILED, _reason(error), exit_code(error))
            raise

    def _write(self, state: State, reason: str | None = None, code: int | None = None) -> None:
        if not self.writes:
            return
        with self._lock:
            if self._ended:
                return
            self._ended = state is not State.RUNNING
            self._fields |= {"state": state, "reason": reason, "exit_code": code}
            self._written = time.monotonic()
            try:
                if not self._may_write():
                    return
                write_whole(self._path, json.dumps(self._fields, indent=1).encode() + b"\n")
            except OSError as error:  # the run does not need the file, so it goes on
                say(f"sleeptrain: {self._path} was not written: {error.strerror}", sys.stderr, flush=True)

    def _may_write(self) -> bool:
        """True if no other process has the lease on the folder. Raises OSError if the lease cannot be read."""
        if not self.lease.is_taken:
            return self.lease.is_free()
        try:
            self.lease.check()
        except LeaseError:
            return False
        return True


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return format_error(error).removeprefix("sleeptrain: ")
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status of the run in `folder`; None if there is no file or it is no valid status."""
    try:
        status = parse_json(read_bounded(folder / FILE, SETTINGS_BYTES))
    except (OSError, ValueError, DataError):
        return None
    return status if isinstance(status, dict) and _is_status(status) else None


def is_finished(folder: Path) -> bool:
    """True if the run in `folder` says that it is finished."""
    status = read_status(folder)
    return status is not None and status["state"] == State.FINISHED


def _is_status(fields: dict[str, Any]) -> bool:
    """True if the fields that are read later are present and have the right type."""
    attempt, progress_at, saving = fields.get("attempt", 0), fields.get("progress_at"), fields.get("save_seconds", 0.0)
    return (
        fields.get("state") in tuple(State)
        and all(is_count(fields.get(name)) for name in ("step", "tokens"))
        and (attempt is None or (isinstance(attempt, dict) and is_count(attempt.get("number"))))
        and (progress_at is None or is_time(progress_at))
        and is_time(saving)
        and isinstance(fields.get("reason"), str | None)
    )
