"""A run over several forks of the test process, which meet as processes under srun do: rank 0 holds the store."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import torch

from sleeptrain.config.schema import Config
from sleeptrain.errors import TOLD_IN_A_LINE, exit_code, format_error
from sleeptrain.stop import EXIT_STOPPED, Stopped
from sleeptrain.train import trainer
from tests.parallel.processes import PR_SET_PDEATHSIG
from tests.watch.faults import Fault, install


class Ranks:
    """workers: by rank. log: the stderr of a rank."""

    def __init__(self, folder: Path, workers: list[BaseProcess]) -> None:
        self._folder, self.workers = folder, workers

    def wait(self, ranks: list[int], timeout: float) -> list[int | None]:
        """Wait for the end of these ranks; their exit codes, None for a rank that has not ended in time."""
        deadline = time.monotonic() + timeout
        for rank in ranks:
            self.workers[rank].join(max(deadline - time.monotonic(), 0))
        return [self.workers[rank].exitcode for rank in ranks]

    def log(self, rank: int) -> str:
        return (self._folder / f"stderr-{rank}").read_text()


@contextlib.contextmanager
def started(folder: Path, config: Config, size: int, fault: Fault | None, port: int = 0) -> Iterator[Ranks]:
    """The run; no process survives the block. port: where the processes meet; 0 takes any free port."""
    context, workers = multiprocessing.get_context("fork"), list[BaseProcess]()
    port = port or free_port()
    try:
        for rank in range(size):
            workers.append(context.Process(target=_work, args=(folder, config, rank, size, port, fault)))
            workers[-1].start()
        yield Ranks(folder, workers)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(folder: Path, config: Config, rank: int, size: int, port: int, fault: Fault | None) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.set_num_threads(1)
        os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if fault is not None:
            install(fault)
        code = trainer.train(config)
    except TOLD_IN_A_LINE as error:
        print(format_error(error), file=sys.stderr)
        code = exit_code(error)
    except Stopped:
        code = EXIT_STOPPED
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
