"""A lease on a folder: one process at a time writes into it, also where several machines share the file system.

The file `lease.json` names the holder. It is created by a hard link, which only one process can make. The holder
touches the file every BEAT seconds. Another process that wants the folder watches the file for changes and measures the
time by its own clock, so the clocks of two machines are never compared. It takes over a lease without a sign of life
for STALE seconds, or at once if the holder was a process of the same machine and has ended. A holder that was only
delayed calls `check` before it changes files in the folder, and so notices that it has lost the lease.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sleeptrain.errors import LeaseError
from sleeptrain.files import beside, sync
from sleeptrain.holder import Holder, began, last_sign, machine, read_holder
from sleeptrain.terminal import say

FILE = "lease.json"
# Seconds between two signs of life; seconds without one until a lease is taken over.
BEAT, STALE = 5.0, 60.0
# Seconds until a second process is refused while the holder lives. The holder may be about to end. The longer time is
# for an earlier attempt of the same job, which the scheduler is ending.
GRACE, GRACE_OF_JOB = 5.0, 300.0
# Seconds between two looks at another process's lease; seconds until a lease that was moved by mistake is back.
LOOK, BACK_AFTER = 0.5, 2.0
# Error codes of file systems without hard links.
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Lease:
    """The lease on `folder` in one process. As a context manager it is released at the end of the block.

    busy: the holder's activity, in messages to other processes, such as `runs/a is being trained`.
    way_out: what the user of another process can do instead.
    """

    def __init__(self, folder: Path, busy: str, way_out: str) -> None:
        self.folder, self.path = folder, folder / FILE
        self._busy, self._way_out = busy, way_out
        self._token = ""
        self.is_taken = False
        self._lost: LeaseError | None = None
        self._made: Path | None = None  # the outermost folder that this lease created
        self._ended = threading.Event()

    @property
    def made_folder(self) -> bool:
        """True if the lease created the folder."""
        return self._made is not None

    def take(
        self,
        job: str | None = None,
        facts: Callable[[], Mapping[str, Any]] = dict,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Take the lease; wait while its holder may be dead or about to end. False if a stop was requested.

        job: Slurm job id, if any. facts: returns further values for messages to other processes; called when the lease
        is free. stop_requested: returns True once this process has been asked to stop. Raises LeaseError if another
        process holds the lease, OSError if the folder cannot be made or written.
        """
        try:
            self._make_folder()
            if not self._wait(job, facts, stop_requested):
                return False
        finally:
            if not self.is_taken:
                self._remove_made()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return True

    def _wait(
        self, job: str | None, facts: Callable[[], Mapping[str, Any]], stop_requested: Callable[[], bool]
    ) -> bool:
        watch, has_warned = _Watch(self.path), False
        while not self._publish(job, facts):
            if stop_requested():
                return False
            holder = watch.look()
            if holder is None:
                time.sleep(LOOK)
            elif holder.has_ended or watch.is_stale:
                self._take_away(holder.token)
            elif watch.has_waited(holder, job):
                raise LeaseError(f"{self._busy} by {holder}; {_end_it(holder)}, or {self._way_out}")
            else:
                if not (holder.is_local or has_warned):
                    line = f"{self._busy} by {holder}, unless that has died: watching it for up to {STALE:.0f} s"
                    say(f"sleeptrain: {line}", sys.stderr, flush=True)
                    has_warned = True
                time.sleep(LOOK)
        return True

    def check(self) -> None:
        """Raises LeaseError unless this process still holds the lease, OSError if the file cannot be read."""
        if not self.is_taken:
            raise LeaseError(f"{self.folder} is not held by this process any longer")
        if self._lost is None and not self._is_ours():
            self._lost = self._loss()
        self.check_known()

    def check_known(self) -> None:
        """Raises LeaseError if this process already knows that it lost the lease. Does not read the file."""
        if self._lost is not None:
            raise self._lost

    def is_free(self) -> bool:
        """True if nobody holds the lease, or its holder has ended."""
        holder = read_holder(self.path)
        return holder is None or holder.has_ended

    def release(self) -> None:
        """Release the lease, and remove the folder if the lease created it and it is empty. May be called again."""
        self._ended.set()
        if not self.is_taken:
            return
        self.is_taken = False
        if self._lost is None:
            with contextlib.suppress(OSError):
                self._take_away(self._token)
            self._remove_made()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not os.path.exists(path)]
        self._made = missing[-1] if missing else None
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_made(self) -> None:
        """Remove the empty folders among those that were made for the lease."""
        folder = self.folder
        with contextlib.suppress(OSError):
            while self._made is not None and folder.is_relative_to(self._made):
                if os.path.isdir(folder):
                    folder.rmdir()
                folder = folder.parent

    def _publish(self, job: str | None, facts: Callable[[], Mapping[str, Any]]) -> bool:
        """Try to create the lease file; True if this process now holds the lease."""
        if self.path.exists():
            return False
        token, partial = secrets.token_hex(8), beside(self.path, "partial")
        who = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine(), "began": began(os.getpid())}
        content = {"token": token, **who, "since": time.time(), "job": job, "facts": dict(facts())}
        try:
            with open(partial, "xb") as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if not _link(partial, self.path):
                return False
        except FileNotFoundError:  # another holder has cleaned the folder up, or has removed it on release
            self.folder.mkdir(parents=True, exist_ok=True)
            return False
        finally:
            partial.unlink(missing_ok=True)
        sync(self.folder)
        self._token, self.is_taken = token, True
        return True

    def _take_away(self, token: str) -> None:
        """Remove the lease with this token. If another process has taken the lease meanwhile, put its file back."""
        aside = beside(self.path, "old")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if (moved := read_holder(aside)) is not None and moved.token != token:
            _link(aside, self.path)
        aside.unlink()

    def _beat(self) -> None:
        """Give signs of life. A failed write is ignored, because only `check` decides if the lease is lost."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                if not self._is_ours():
                    self._lost = self._loss()
                    return
                os.utime(self.path)

    def _is_ours(self) -> bool:
        until = time.monotonic() + BACK_AFTER
        while True:
            if (holder := read_holder(self.path)) is not None:
                return holder.token == self._token
            if time.monotonic() > until:
                return False
            time.sleep(LOOK / 5)

    def _loss(self) -> LeaseError:
        holder = read_holder(self.path)
        how = f"was taken over by {holder}" if holder else f"is no longer held by this process: {FILE} was removed"
        return LeaseError(f"{self.folder} {how}; this process ends, and has written nothing since")


class _Watch:
    """Watches the lease of another process, and measures time by the clock of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sign: tuple[str, int] | None = None
        self._since = time.monotonic()  # the first look at this sign of life
        self._met = time.monotonic()  # the first look at this holder
        self._lives = False

    def look(self) -> Holder | None:
        holder, now = read_holder(self._path), time.monotonic()
        if holder is None:
            return None
        with contextlib.suppress(OSError):
            sign = (holder.token, last_sign(self._path))
            if self._sign is None or sign[0] != self._sign[0]:
                self._met, self._lives, self._since = now, False, now
            elif sign != self._sign:
                self._lives, self._since = True, now
            self._sign = sign
        return holder

    @property
    def is_stale(self) -> bool:
        """True if there was no sign of life for so long that the holder counts as dead."""
        return time.monotonic() - self._since >= STALE

    def has_waited(self, holder: Holder, job: str | None) -> bool:
        """True if the holder is alive and has had its time to end."""
        if not (holder.is_local or self._lives):
            return False
        grace = GRACE_OF_JOB if job is not None and holder.job == job else GRACE
        return time.monotonic() - self._met >= grace


def _link(source: Path, target: Path) -> bool:
    """Give a file the second name `target` unless that exists; True if the file has it now."""
    try:
        os.link(source, target)
    except FileExistsError:
        return os.stat(source).st_nlink > 1  # a network file system may repeat a request that succeeded
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with open(target, "xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


def _end_it(holder: Holder) -> str:
    if holder.is_local:
        return f"wait until it has ended, stop it (kill {holder.pid})"
    return "wait until it has ended, stop it there"
