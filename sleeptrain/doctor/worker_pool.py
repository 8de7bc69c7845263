"""Processes that make checks, so that one that crashes or hangs takes nothing with it.

They are forks of a process that has loaded neither torch nor CUDA, each in a session of its own, and die with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sleeptrain.doctor.checks import CHECKS
from sleeptrain.doctor.finding import FAILED, OK, Case, Finding, Result, failed
from sleeptrain.errors import UserError

# How long the others may go on after one has failed: what it says first may follow from the end of another.
GRACE_SECONDS = 1.0
REAP_SECONDS = 2.0
PR_SET_PDEATHSIG = 1
# By these a launcher tells its processes of each other; those of a check are alone.
LAUNCHERS = ("SLURM_", "PMI", "OMPI_", "TORCHELASTIC_", "GROUP_", "ROLE_")
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Worker:
    """One forked process; `pipe` gets a line of JSON for each check it has made, and closes when it ends."""

    def __init__(self, names: Sequence[str], case: Case):
        self.pipe, writer = os.pipe()
        self._rest, self.closed = b"", False
        self._code: int | None = None
        self._log = case.folder / f"log-{case.rank}"
        starter = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _work(names, case, writer, self._log, starter)
        os.close(writer)

    def read(self) -> list[Finding]:
        """What has come since the last time, at least something or the end; does not wait after that."""
        chunk = os.read(self.pipe, 1 << 16)
        if not chunk:
            self.closed = True
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [Finding(**json.loads(line)) for line in lines]

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()
            return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "")
        return ""

    def end(self) -> None:
        """Kills it and all that it started. One that the kernel does not let go (dead storage) is left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        if self._code is None:  # it may not have come as far as a session of its own
            os.kill(self._pid, signal.SIGKILL)
        os.close(self.pipe)
        self.exit_code()

    def exit_code(self) -> int | None:
        """That of one which is at its end, negative for a signal; None where it does not come to it in time."""
        deadline = time.monotonic() + REAP_SECONDS
        while self._code is None and time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)
        return self._code


class WorkerPool:
    """`size` processes that make the same checks in turn. After a failure of several, or a crash, the crew is over."""

    def __init__(self, names: Sequence[str], case: Case, size: int = 1):
        self.left = list(names)
        folder = case.folder
        folder.mkdir()
        self.workers: list[Worker] = []
        self._answers: dict[int, Finding] = {}
        self._size, self._queues = size, [list[Finding]() for _ in range(size)]
        for rank in range(size):
            self.workers.append(Worker(names, Case(case.config, case.machines, folder, rank, size)))
        self._begin()

    def _begin(self) -> None:
        self._began = time.monotonic()
        self.deadline = self._began + (CHECKS[self.left[0]].limit if self.left else 0.0)
        self._answers = {}
        self.over = not self.left

    def pipes(self) -> dict[int, int]:
        """{pipe: rank} of those that still may say something."""
        return {worker.pipe: rank for rank, worker in enumerate(self.workers) if not worker.closed}

    def hear(self, rank: int) -> None:
        self._queues[rank] += self.workers[rank].read()

    def results(self) -> list[Result]:
        """Of the checks that are decided by what has been heard, or by the time."""
        decided = []
        while not self.over and (finding := self._decide()) is not None:
            decided.append(Result(self.left.pop(0), finding, time.monotonic() - self._began))
            if finding.state == FAILED and (self._size > 1 or self._broken()):
                self.over = True
            else:
                self._begin()
        return decided

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def _broken(self) -> bool:
        return len(self._answers) < self._size

    def _decide(self) -> Finding | None:
        for rank, queue in enumerate(self._queues):
            if queue and rank not in self._answers:
                self._answers[rank] = queue.pop(0)
        bad = [finding for finding in self._answers.values() if finding.state == FAILED]
        ended = [rank for rank, worker in enumerate(self.workers) if worker.closed and rank not in self._answers]
        if (bad or ended) and self._size > 1:
            self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
        late = time.monotonic() >= self.deadline
        if len(self._answers) + len(ended) < self._size and not late:
            return None
        if ended:
            return self._crashed(ended[0])
        if bad:
            return bad[0]
        if len(self._answers) < self._size:
            return self._hung()
        findings = list(self._answers.values())
        return next((finding for finding in findings if finding.state == OK), findings[0])

    def _hung(self) -> Finding:
        check, limit = CHECKS[self.left[0]], CHECKS[self.left[0]].limit
        silent = [rank for rank in range(self._size) if rank not in self._answers]
        who = f" from {'processes' if len(silent) > 1 else 'process'} {', '.join(map(str, silent))}"
        return failed(f"no answer{who if self._size > 1 else ''} within {limit:g} s", check.cure)

    def _crashed(self, rank: int) -> Finding:
        worker = self.workers[rank]
        code = worker.exit_code() or 0
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        who = f"process {rank} " if self._size > 1 else ""
        words = f" ({said})" if (said := worker.last_words()) else ""
        return failed(f"{who}{how}{words}", CHECKS[self.left[0]].cure)


def _work(names: Sequence[str], case: Case, writer: int, log: Path, starter: int) -> NoReturn:
    """A worker's whole life. Nothing of the process that it is a fork of is cleaned up here."""
    code = 1
    try:
        os.setsid()
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != starter:
            os._exit(1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        _leave_the_job(case)
        for name in names:
            os.write(writer, json.dumps(_make(name, case).to_json()).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _leave_the_job(case: Case) -> None:
    for name in [n for n in os.environ if n in PLACES or n.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the others work at the same time
    if case.config is not None and case.config.train.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _make(name: str, case: Case) -> Finding:
    check = CHECKS[name]
    try:
        return check.load()(case)
    except UserError as error:
        return failed(str(error), "")  # which says the way out
    except ImportError as error:
        return failed(f"cannot be loaded: {error}", check.cure)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return failed(f"{type(error).__name__}: {lines[0][:300]}", check.cure)
