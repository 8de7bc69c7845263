"""Several ranks on one machine: workers forked from the test process, joined by gloo over a file.

Forking spares each rank the imports (torch and megatron-core take seconds), so that a test of four ranks takes tenths.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

# How long the other ranks may go on after one has failed: long enough to report their own errors.
GRACE_SECONDS = 2.0
# How long a test waits for an event that must come, however busy the machine is.
PATIENCE = 240.0
PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds every rank's report."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """Calls `function(*args)` on each of `world_size` gloo ranks and returns what they returned, by rank.

    `function` and `args` may be closures: the workers are forks. What it returns must go through torch.save. Raises
    RankError with each failed rank's traceback, or after `timeout` seconds with each rank's stack; no process survives.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        workers: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                worker = context.Process(target=_worker, args=(function, args, rank, world_size, folder, timeout))
                worker.start()
                workers.append(worker)
            _wait(workers, timeout)
        finally:
            for worker in workers:
                _kill(worker)
        _raise_failures(workers, folder, timeout)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def run_cases(function: Callable[..., Any], world_size: int, cases: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Calls `function(case)` for one case after another on ranks that start once: {name: what they returned, by rank}.

    A start takes longer than most cases. Raises as `run_ranks`; the report of a rank that raised names the case.
    """

    def each() -> dict[str, Any]:
        results = {}
        for name, case in cases.items():
            try:
                results[name] = function(case)
            except Exception as error:
                error.add_note(f"in the case '{name}'")
                raise
        return results

    ranks = run_ranks(each, world_size)
    return {name: [results[name] for results in ranks] for name in cases}


@contextlib.contextmanager
def naming(case: str) -> Iterator[None]:
    """Names the case in the failure of a test that checks several."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in the case '{case}'")
        raise


def selected(request: pytest.FixtureRequest, test: str, argument: str) -> list[Any]:
    """The values that the tests to be run, of this name and of the fixture's module, have for an argument."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    ours = [item for item in items if item.module is request.module and item.originalname == test]
    return list(dict.fromkeys(item.callspec.params[argument] for item in ours))


def _worker(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, folder: Path, timeout: float
) -> NoReturn:
    code = 1
    try:
        os.setsid()  # so that processes that a rank starts end with it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives a killed test process
        torch.set_num_threads(1)  # a fork of a process that has OpenMP threads may not use them
        stacks = (folder / f"{rank}.stack").open("w")
        faulthandler.dump_traceback_later(max(timeout - 0.5, 0.1), file=stacks)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        limit = datetime.timedelta(seconds=timeout)
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()  # a rank that leaves early breaks the connections that slower ones still open
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    os._exit(code)  # a fork runs neither pytest's clean-up nor that of fixtures


def _wait(workers: list[BaseProcess], timeout: float) -> None:
    """Wait until all have ended, `timeout` seconds are over, or the grace after a first failure is over."""
    deadline = time.monotonic() + timeout
    running = {worker.sentinel: worker for worker in workers}
    while running and (remaining := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=remaining):
            worker = running.pop(sentinel)  # type: ignore[index]
            worker.join()
            if worker.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _kill(worker: BaseProcess) -> None:
    """Kill the rank and all that it started. A rank that does not have its own group yet is killed alone."""
    assert worker.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    if worker.is_alive():
        worker.kill()
    worker.join()


def _raise_failures(workers: list[BaseProcess], folder: Path, timeout: float) -> None:
    reports = []
    for rank, worker in enumerate(workers):
        error, stack = folder / f"{rank}.error", folder / f"{rank}.stack"
        if error.exists():
            reports.append(f"rank {rank} raised\n{error.read_text()}")
        elif worker.exitcode != 0:
            where = stack.read_text() if stack.exists() else ""
            reports.append(f"rank {rank} did not finish in {timeout:g} s (exit code {worker.exitcode})\n{where}")
    if reports:
        raise RankError("\n".join(reports))
