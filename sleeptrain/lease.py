"""A lease on a folder: one process at a time writes into it, also where several machines share the file system.

The file `lease.json` says who holds it. It appears by a hard link, which one process alone can make. Its holder touches
it every BEAT seconds; whoever else wants the folder watches whether it changes, by a clock of its own, so that the
clocks of two machines are never compared. A lease without a sign of life for STALE seconds is taken over; one of this
machine is, at once, where its process is gone. A holder that was only held up finds that out by `check`, before it
changes what another one relies on.
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
# Seconds between two signs of life, and without one until a lease is taken over.
BEAT, STALE = 5.0, 60.0
# Seconds until a second process is refused where the holder lives: it may be on its way out, or an earlier attempt of
# the same job, which the scheduler is ending.
GRACE, GRACE_OF_JOB = 5.0, 300.0
# Seconds between two looks at somebody else's lease, and in which one that was moved by mistake is put back.
LOOK, BACK_AFTER = 0.5, 2.0
# What file systems without hard links answer.
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Lease:
    """The lease on `folder` as one process sees it; left as a context it is given back.

    busy: what others are told that the holder does, as in `runs/a is being trained`. way_out: what they can do else.
    """

    def __init__(self, folder: Path, busy: str, way_out: str) -> None:
        self.folder, self.path = folder, folder / FILE
        self._busy, self._way_out = busy, way_out
        self._token = ""
        self.is_taken = False
        self._lost: LeaseError | None = None
        self._made: Path | None = None  # the outermost folder that did not exist before
        self._ended = threading.Event()

    @property
    def made_folder(self) -> bool:
        """Whether the folder was not there before the lease was taken."""
        return self._made is not None

    def take(
        self,
        job: str | None = None,
        facts: Callable[[], Mapping[str, Any]] = dict,
        asked: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Waits until the lease can be had, for so long as that is likely; False where `asked` to stop meanwhile.

        job: Slurm's, if any. facts: what others are told besides; looked up when nobody has the lease. Raises
        LeaseError where another process holds it, OSError where the folder cannot be made or written.
        """
        try:
            self._make_folder()
            if not self._wait(job, facts, asked):
                return False
        finally:
            if not self.is_taken:
                self._remove_made()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return True

    def _wait(self, job: str | None, facts: Callable[[], Mapping[str, Any]], asked: Callable[[], bool]) -> bool:
        watch, told = _Watch(self.path), False
        while not self._publish(job, facts):
            if asked():
                return False
            holder = watch.look()
            if holder is None:
                time.sleep(LOOK)
            elif holder.has_ended or watch.is_stale:
                self._take_away(holder.token)
            elif watch.has_waited(holder, job):
                raise LeaseError(f"{self._busy} by {holder}; {_end_it(holder)}, or {self._way_out}")
            else:
                if not (holder.is_local or told):
                    line = f"{self._busy} by {holder}, unless that has died: watching it for up to {STALE:.0f} s"
                    say(f"sleeptrain: {line}", sys.stderr, flush=True)
                    told = True
                time.sleep(LOOK)
        return True

    def check(self) -> None:
        """Raises LeaseError unless this process still holds the lease, OSError where the storage does not say."""
        if not self.is_taken:
            raise LeaseError(f"{self.folder} is not held by this process any longer")
        if self._lost is None and not self._is_ours():
            self._lost = self._loss()
        self.check_known()

    def check_known(self) -> None:
        """The same as far as it is known without a look at the file."""
        if self._lost is not None:
            raise self._lost

    def is_free(self) -> bool:
        """Whether nobody holds it who may be alive."""
        holder = read_holder(self.path)
        return holder is None or holder.has_ended

    def release(self) -> None:
        """Gives the lease back, and removes the folder where it was made for nothing. May be called again."""
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not os.path.exists(path)]
        self._made = missing[-1] if missing else None
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_made(self) -> None:
        """The folders that were made for the lease, as far as nothing has come into them."""
        folder = self.folder
        with contextlib.suppress(OSError):
            while self._made is not None and folder.is_relative_to(self._made):
                if os.path.isdir(folder):
                    folder.rmdir()
                folder = folder.parent

    def _publish(self, job: str | None, facts: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether the file is now this process's."""
        if self.path.exists():
            return False
        token, own = secrets.token_hex(8), beside(self.path, "partial")
        who = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine(), "began": began(os.getpid())}
        content = {"token": token, **who, "since": time.time(), "job": job, "facts": dict(facts())}
        try:
            with open(own, "xb") as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if not _link(own, self.path):
                return False
        except FileNotFoundError:  # whoever holds the folder has cleaned it up, or has removed it at its end
            self.folder.mkdir(parents=True, exist_ok=True)
            return False
        finally:
            own.unlink(missing_ok=True)
        sync(self.folder)
        self._token, self.is_taken = token, True
        return True

    def _take_away(self, token: str) -> None:
        """Removes the lease of this token; that of another one, which has come meanwhile, is put back."""
        aside = beside(self.path, "old")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if (moved := read_holder(aside)) is not None and moved.token != token:
            _link(aside, self.path)
        aside.unlink()

    def _beat(self) -> None:
        """Signs of life. Where the storage takes none they are missed, and it is `check` that counts."""
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
    """Looks at somebody else's lease, and counts by the clock of this process."""

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
        """Without a sign of life for so long that it is taken for dead."""
        return time.monotonic() - self._since >= STALE

    def has_waited(self, holder: Holder, job: str | None) -> bool:
        """Whether the holder lives, and has been given time to end."""
        if not (holder.is_local or self._lives):
            return False
        grace = GRACE_OF_JOB if job is not None and holder.job == job else GRACE
        return time.monotonic() - self._met >= grace


def _link(whole: Path, target: Path) -> bool:
    """Gives a file a second name unless that is taken; whether it now has it."""
    try:
        os.link(whole, target)
    except FileExistsError:
        return os.stat(whole).st_nlink > 1  # a network file system may answer so to a request that it has repeated
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with open(target, "xb") as file:
                file.write(whole.read_bytes())
        except FileExistsError:
            return False
    return True


def _end_it(holder: Holder) -> str:
    if holder.is_local:
        return f"wait until it has ended, stop it (kill {holder.pid})"
    return "wait until it has ended, stop it there"
