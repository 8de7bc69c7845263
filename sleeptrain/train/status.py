"""`status.json` in the run folder: how a run stands, for scripts that start it again. A launcher hides exit codes."""

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
# Seconds between two notes of progress, at least.
INTERVAL = 10.0


class State(StrEnum):
    """How a run stands. A killed one is still RUNNING: nobody was left to say otherwise."""

    RUNNING = "running"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


CODES = {State.STOPPED: EXIT_STOPPED, State.FINISHED: 0}


class Status:
    """The file of one run. writes: whether this process keeps it; the others' calls do nothing.

    lease: that on the run folder; nothing is written while another process has it. What another attempt left is known
    until `begin`. The first `end` of an attempt counts.
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
        """Takes over what is in the file: another attempt may have gone on until now."""
        fields = {"step": 0, "tokens": 0, "attempt": None, "progress_at": None, "save_seconds": 0.0}
        self._fields: dict[str, Any] = read_status(self._path.parent) or fields

    @property
    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 where there was none."""
        attempt = self._fields["attempt"]
        return attempt["number"] if attempt else 0

    @property
    def save_seconds(self) -> float:
        """The longest that a checkpoint of the run has taken, in any attempt."""
        return float(self._fields.get("save_seconds", 0.0))

    def begin(self, attempt: Attempt, step: int, tokens: int) -> None:
        """The run goes on from here."""
        self._fields |= {"step": step, "tokens": tokens, "attempt": asdict(attempt), "progress_at": time.time()}
        self._begun = True
        self._write(State.RUNNING)

    def progress(self, step: int, tokens: int, save_seconds: float) -> None:
        """A step is done; the longest save so far has taken so long. Written every INTERVAL seconds."""
        self._fields |= {"step": step, "tokens": tokens, "progress_at": time.time()}
        self._fields["save_seconds"] = max(save_seconds, self.save_seconds)
        if time.monotonic() - self._written > INTERVAL:
            self._write(State.RUNNING)

    def end(self, state: State, reason: str | None = None, code: int | None = None) -> None:
        """The attempt is over. code: the exit code, of a failure.

        A start that was refused leaves nothing where there is no run: its folder is not made.
        """
        folder = os.path.isdir(self._path.parent)  # which never raises
        if state is not State.FAILED or self._begun or (folder and not self.lease.made_folder):
            self._write(state, reason, CODES.get(state, code))

    def end_of_killed(self, reason: str, code: int) -> None:
        """The process that kept the file was killed, as far as the file knows."""
        if self._fields.get("state") == State.RUNNING:
            self.end(State.FAILED, reason, code)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """An error that leaves the block is noted."""
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
            except OSError as error:  # it is a view of the run, which goes on
                say(f"sleeptrain: {self._path} was not written: {error.strerror}", sys.stderr, flush=True)

    def _may_write(self) -> bool:
        """Whether no other process has the folder. Raises OSError where the storage does not say."""
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
    """The status of the run in `folder`; None where there is none, or another program has spoiled it."""
    try:
        found = parse_json(read_bounded(folder / FILE, SETTINGS_BYTES))
    except (OSError, ValueError, DataError):
        return None
    return found if isinstance(found, dict) and _is_status(found) else None


def _is_status(found: dict[str, Any]) -> bool:
    """Whether what is read of a status later is there, and of its kind."""
    attempt, at, saving = found.get("attempt", 0), found.get("progress_at"), found.get("save_seconds", 0.0)
    return (
        found.get("state") in tuple(State)
        and all(is_count(found.get(name)) for name in ("step", "tokens"))
        and (attempt is None or (isinstance(attempt, dict) and is_count(attempt.get("number"))))
        and (at is None or is_time(at))
        and is_time(saving)
        and isinstance(found.get("reason"), str | None)
    )
