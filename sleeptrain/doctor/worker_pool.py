"""Processes that run checks, so that a check that crashes or hangs does not stop the doctor.

Each is a fork of a process that has imported neither torch nor CUDA, in its own session, and ends when its parent ends.
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

# After a failure the other processes get this time: the failure may be the result of another process's end.
GRACE_SECONDS = 1.0
REAP_SECONDS = 2.0
PR_SET_PDEATHSIG = 1
# Environment variables of launchers. The workers remove them: they are no part of the launcher's job.
LAUNCHERS = ("SLURM_", "PMI", "OMPI_", "TORCHELASTIC_", "GROUP_", "ROLE_")
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Worker:
    """One forked process. It writes a line of JSON to `pipe` after each check; the pipe closes when it ends."""

    def __init__(self, names: Sequence[str], case: Case):
        self.pipe, writer = os.pipe()
        self._rest, self.closed = b"", False
        self._code: int | None = None
        self._log = case.folder / f"log-{case.rank}"
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _work(names, case, writer, self._log, parent)
        os.close(writer)

    def read(self) -> list[Finding]:
        """The new findings. Waits only if the pipe has neither data nor its end."""
        chunk = os.read(self.pipe, 1 << 16)
        if not chunk:
            self.closed = True
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [Finding(**json.loads(line)) for line in lines]

    def last_output(self) -> str:
        """The last line that the process printed, at most 200 characters."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()
            return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "")
        return ""

    def end(self) -> None:
        """Kill the process and its children. Does not wait for one that the kernel cannot end (dead storage)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        if self._code is None:  # it may not have reached setsid
            os.kill(self._pid, signal.SIGKILL)
        os.close(self.pipe)
        self.exit_code()

    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None if the process does not end within REAP_SECONDS."""
        deadline = time.monotonic() + REAP_SECONDS
        while self._code is None and time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)
        return self._code


class WorkerPool:
    """`size` processes that run the same checks in turn.

    remaining: names of the checks without a result.
    deadline: time.monotonic() at which the current check counts as hung.
    finished: True after the last check, after a crash, and after any failure if size > 1.
    """

    def __init__(self, names: Sequence[str], case: Case, size: int = 1):
        self.remaining = list(names)
        folder = case.folder
        folder.mkdir()
        self.workers: list[Worker] = []
        self._findings: dict[int, Finding] = {}
        self._size, self._queues = size, [list[Finding]() for _ in range(size)]
        for rank in range(size):
            self.workers.append(Worker(names, Case(case.config, case.machines, folder, rank, size)))
        self._start_check()

    def _start_check(self) -> None:
        self._started = time.monotonic()
        self.deadline = self._started + (CHECKS[self.remaining[0]].limit if self.remaining else 0.0)
        self._findings = {}
        self.finished = not self.remaining

    def pipes(self) -> dict[int, int]:
        """{pipe: rank} of the workers that have not ended."""
        return {worker.pipe: rank for rank, worker in enumerate(self.workers) if not worker.closed}

    def read(self, rank: int) -> None:
        """Queue the new findings of one worker."""
        self._queues[rank] += self.workers[rank].read()

    def results(self) -> list[Result]:
        """The results of the checks that the findings so far, or the deadline, decide."""
        results = []
        while not self.finished and (finding := self._decide()) is not None:
            results.append(Result(self.remaining.pop(0), finding, time.monotonic() - self._started))
            if finding.state == FAILED and (self._size > 1 or self._broken()):
                self.finished = True
            else:
                self._start_check()
        return results

    def end(self) -> None:
        for worker in self.workers:
            worker.end()

    def _broken(self) -> bool:
        return len(self._findings) < self._size

    def _decide(self) -> Finding | None:
        for rank, queue in enumerate(self._queues):
            if queue and rank not in self._findings:
                self._findings[rank] = queue.pop(0)
        failures = [finding for finding in self._findings.values() if finding.state == FAILED]
        ended = [rank for rank, worker in enumerate(self.workers) if worker.closed and rank not in self._findings]
        if (failures or ended) and self._size > 1:
            self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
        late = time.monotonic() >= self.deadline
        if len(self._findings) + len(ended) < self._size and not late:
            return None
        if ended:
            return self._crashed(ended[0])
        if failures:
            return failures[0]
        if len(self._findings) < self._size:
            return self._hung()
        findings = list(self._findings.values())
        return next((finding for finding in findings if finding.state == OK), findings[0])

    def _hung(self) -> Finding:
        check, limit = CHECKS[self.remaining[0]], CHECKS[self.remaining[0]].limit
        silent = [rank for rank in range(self._size) if rank not in self._findings]
        who = f" from {'processes' if len(silent) > 1 else 'process'} {', '.join(map(str, silent))}"
        return failed(f"no answer{who if self._size > 1 else ''} within {limit:g} s", check.cure)

    def _crashed(self, rank: int) -> Finding:
        worker = self.workers[rank]
        code = worker.exit_code() or 0
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        who = f"process {rank} " if self._size > 1 else ""
        output = f" ({line})" if (line := worker.last_output()) else ""
        return failed(f"{who}{how}{output}", CHECKS[self.remaining[0]].cure)


def _work(names: Sequence[str], case: Case, writer: int, log: Path, parent: int) -> NoReturn:
    """Run the checks in the forked process, then exit. os._exit skips the cleanup of the parent's state."""
    code = 1
    try:
        os.setsid()
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _set_environment(case)
        for name in names:
            os.write(writer, json.dumps(_run_check(name, case).to_json()).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _set_environment(case: Case) -> None:
    for name in [n for n in os.environ if n in PLACES or n.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # other checks run at the same time
    if case.config is not None and case.config.train.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run_check(name: str, case: Case) -> Finding:
    check = CHECKS[name]
    try:
        return check.load()(case)
    except UserError as error:
        return failed(str(error), "")  # the message names the way out
    except ImportError as error:
        return failed(f"cannot be loaded: {error}", check.cure)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return failed(f"{type(error).__name__}: {lines[0][:300]}", check.cure)
