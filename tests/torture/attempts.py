"""One start of a run, which a test may strike. Processes start as in the product, but ranks are forks.

The ranks are forks of a process that has all imports, so that four of them start in a second. Their own processes, and
those that outlive them, are found as descendants of the test, which adopts orphans, and by a mark in the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import psutil

from sleeptrain.config.schema import Config
from sleeptrain.errors import TOLD_IN_A_LINE, exit_code
from sleeptrain.stop import EXIT_STOPPED, SIGNALS, Stopped
from sleeptrain.train import spawn, trainer
from tests.parallel.processes import PATIENCE, PR_SET_PDEATHSIG
from tests.torture.holds import Hold, Signs, install

PR_SET_CHILD_SUBREAPER = 36
MARK = "SLEEPTRAIN_TORTURE"
# Seconds until an attempt must have ended after a strike, and then until its last process must have ended.
ENDS_AFTER, GONE_AFTER = PATIENCE, PATIENCE


class Attempt:
    """A run that has been started in `size` processes; `starter` is the process that a user would start.

    hold: where one of them halts. fault: called first by the starter, so that it acts in all forks.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        size: int,
        hold: Hold | None = None,
        fault: Callable[[], object] = lambda: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.size, self.signs = size, Signs()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # not in the run's folder, whose disk a test may fill
        self._mark = secrets.token_hex(8)
        self._halted = folder / f"halted-{self._mark}"
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self.starter = multiprocessing.get_context("fork").Process(target=self._run, args=(config, hold, fault))
        self.starter.start()

    @property
    def log(self) -> str:
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    @property
    def running(self) -> bool:
        return self.starter.is_alive()

    @property
    def halted(self) -> tuple[int, str] | None:
        """(the halted process, the place), or None before a process has halted."""
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            found = json.loads(self._halted.read_text())
            if psutil.Process(found["pid"]).status() == psutil.STATUS_STOPPED:
                return found["pid"], found["where"]
        return None

    def ranks(self) -> list[int]:
        """The processes that train and have started, by rank."""
        assert self.starter.pid is not None
        if self.size == 1:
            return [self.starter.pid]
        started = [self.signs.process(rank) for rank in range(self.size)]
        return [process for process in started if process is not None]

    def end(self) -> int:
        """Wait until all its processes have ended, and return the exit code. Fail if that takes too long."""
        self.starter.join(ENDS_AFTER)
        if self.running:
            self.kill()
            raise AssertionError(f"it did not end in {ENDS_AFTER:g} s\n{self.log}")
        until = time.monotonic() + GONE_AFTER
        while (survivors := self._survivors()) and time.monotonic() < until:
            time.sleep(0.02)
        if survivors:
            names = [" ".join(one.cmdline()) for one in survivors]
            self.kill()
            raise AssertionError(f"left over after {GONE_AFTER:g} s: {names}\n{self.log}")
        code = self.starter.exitcode
        assert code is not None
        return code

    def _survivors(self) -> list[psutil.Process]:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                if child.status() == psutil.STATUS_ZOMBIE and child.pid not in self._before:
                    os.waitpid(child.pid, os.WNOHANG)
        descendants = {p for p in psutil.Process().children(recursive=True) if p.pid not in self._before}
        return [one for one in descendants | set(self._marked()) if _lives(one)]

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    yield process

    def kill(self) -> None:
        """Kill all its processes."""
        for one in self._survivors():
            one.kill()
        self.starter.join()
        self._survivors()

    def _run(self, config: Config, hold: Hold | None, fault: Callable[[], object]) -> NoReturn:
        code = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(self._log.fileno(), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            os.environ[MARK] = self._mark
            install(Path(config.run.root) / config.run.name, self.size, self.signs, hold, self._halted)
            fault()
            code = trainer.train(config) if self.size == 1 else _train_in_forks(config, self.size, self.signs)
        except Stopped:
            code = EXIT_STOPPED
        except TOLD_IN_A_LINE as error:
            print(f"sleeptrain: {error}", file=sys.stderr)
            code = exit_code(error)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def _train_in_forks(config: Config, size: int, signs: Signs) -> int:
    """Train as a user's command does, but without new interpreters, whose imports take seconds."""
    plain, starter = spawn._work, os.getpid()

    def work(config: Config, rank: int, *others: object) -> NoReturn:
        for number in SIGNALS:  # a new interpreter has not inherited them
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signs.set_process(rank, os.getpid())
        # A rank that is forked while the starter's store answers an earlier rank inherits the store's locks.
        while signs.process(size - 1) is None and os.getppid() == starter:
            time.sleep(0.001)
        plain(config, rank, *others)  # type: ignore[arg-type]

    spawn._work = work
    forks = multiprocessing.get_context("fork")
    spawn.multiprocessing = SimpleNamespace(  # type: ignore[assignment]
        get_context=lambda _: forks, parent_process=multiprocessing.parent_process
    )
    return spawn.train_in_workers(config, size)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """In the block, processes that lose their parent become children of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
