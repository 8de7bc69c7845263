"""A run of several processes without a launcher: this process starts them on its machine, and ends with them."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from sleeptrain.config.schema import Config
from sleeptrain.errors import CheckpointError, ConfigError, NonFiniteError, UserError
from sleeptrain.train.stop import Stopped, StopRequest

if TYPE_CHECKING:  # torch is loaded by those who train
    from sleeptrain.watch.beat import Alarm
    from sleeptrain.watch.board import Board

# How long the others may go on after one worker has failed: long enough to report errors of their own.
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def num_workers(config: Config) -> int:
    """The processes to start here: those of one replica where no launcher has started any, else 0.

    Raises ConfigError where each would need a GPU that is not there.
    """
    from sleeptrain.parallel.launch import find_device, find_place

    size = config.parallel.tensor * config.parallel.pipeline
    if size == 1 or find_place(os.environ).size > 1:
        return 0
    if find_device(config.train.device).type == "cuda":
        import torch

        if size > (count := torch.cuda.device_count()):
            raise ConfigError(
                f"parallel.tensor ({config.parallel.tensor}) times parallel.pipeline ({config.parallel.pipeline}) is "
                f"{size}, one GPU each, and this machine has {count}: make them smaller, or start more machines with "
                "torchrun or srun"
            )
    return size


def train_in_workers(config: Config, size: int) -> int:
    """Trains in `size` processes started here; returns the exit code of the first that fails, or 0.

    When one fails or dies, all end, and what it said is shown. Signals are passed on; nothing outlives this process.
    Raises ConfigError for a layout that does not fit, Stopped once all have saved after a signal.
    """
    import torch.distributed as dist

    from sleeptrain.parallel.layout_check import check_layout
    from sleeptrain.watch.board import Board

    check_layout(config, size)
    # Over the store of this process, which none of the workers takes with it, they meet and are watched.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    print(f"sleeptrain: no launcher, so {size} processes are started on this machine", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    workers, reports = list[SpawnProcess](), list[Connection]()
    with StopRequest() as stop:
        try:
            for rank in range(size):
                receiver, sender = context.Pipe(duplex=False)
                worker = context.Process(
                    target=_work, args=(config, rank, size, store.port, sender), name=f"rank{rank}"
                )
                worker.start()
                sender.close()
                workers.append(worker)
                reports.append(receiver)
            with _passing_on(workers):
                if stop.requested:  # before the workers could be told
                    _signal_all(workers, signal.SIGTERM)
                ending = _wait(workers, Board(store, size))
        finally:
            for worker in workers:
                _kill(worker)
        if ending is None and stop.requested:
            raise Stopped(0)
    return 0 if ending is None else _tell(ending, workers, reports)


def _wait(workers: Sequence[SpawnProcess], board: Board) -> Alarm | None:
    """Until all have ended, or the grace after a first failure is over. Why they have ended before their time."""
    ending, deadline = None, float("inf")
    running = {worker.sentinel: rank for rank, worker in enumerate(workers)}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=min(left, 60.0)):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            workers[rank].join()
            if (code := workers[rank].exitcode) and ending is None:
                ending, deadline = _why(rank, code, board), time.monotonic() + GRACE_SECONDS
    return ending


def _why(rank: int, code: int, board: Board) -> Alarm:
    """What the watch knows of the end of a worker; else it is told that the worker was ended, and where."""
    from sleeptrain.watch.beat import Alarm, where

    if not board.is_clear:  # the workers had not met
        return Alarm("lost", (rank,), f"rank {rank} {_ended_by(code)} before all had met", _exit_code(code))
    (beat,), _ = board.read([rank])
    return board.raise_alarm(Alarm("lost", (rank,), f"rank {rank} {_ended_by(code)} {where(beat)}", _exit_code(code)))


def _ended_by(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _exit_code(code: int) -> int:
    """That of a shell, of a process that multiprocessing says has ended with `code`."""
    return 128 - code if code < 0 else code


def _tell(ending: Alarm, workers: Sequence[SpawnProcess], reports: Sequence[Connection]) -> int:
    """Shows why all have ended, in the words of the worker that failed where it has said some; the exit code."""
    rank, said = ending.ranks[0], ""
    with contextlib.suppress(EOFError):
        said = reports[rank].recv() if reports[rank].poll() else ""
    lines = [said.rstrip(), f"sleeptrain: process {rank} of {len(workers)} failed, and all have been ended"]
    if not said or "Traceback" in said:
        lines.insert(1, f"sleeptrain: {ending.text}")
    print("\n".join(line for line in lines if line), file=sys.stderr, flush=True)
    return ending.code


@contextlib.contextmanager
def _passing_on(workers: Sequence[SpawnProcess]) -> Iterator[None]:
    """Signals to this process also reach the workers, which are not in its terminal's group."""
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal_all(workers, number)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def pause(number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: this process, which holds the store, must not stop alone."""
        _signal_all(workers, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _signal_all(workers, signal.SIGCONT)

    before[signal.SIGTSTP] = signal.getsignal(signal.SIGTSTP)
    for number in before:
        signal.signal(number, pause if number == signal.SIGTSTP else pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_all(workers: Sequence[SpawnProcess], number: int) -> None:
    for worker in workers:
        if worker.is_alive() and worker.pid is not None:
            os.kill(worker.pid, number)


def _kill(worker: SpawnProcess) -> None:
    """The worker and all that it started."""
    if worker.pid is not None and worker.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()
    worker.join()


def _work(config: Config, rank: int, size: int, port: int, report: Connection) -> NoReturn:
    """A worker's whole life: its place, the training, its report."""
    os.setsid()  # a Ctrl-C at the terminal comes through the starting process alone
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no worker outlives it
    starter = multiprocessing.parent_process()
    if starter is None or os.getppid() != starter.pid:
        os._exit(1)  # it has died before that was asked for
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # to torch: whoever started the process holds the store
    import torch

    from sleeptrain.train.trainer import train

    if not config.train.threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    code, text = 0, ""
    try:
        code = train(config)
    except Stopped:
        pass
    except (UserError, NonFiniteError, CheckpointError) as error:
        code, text = 2 if isinstance(error, UserError) else 1, f"sleeptrain: {' '.join(str(error).split())}"
    except BaseException:
        code, text = 1, traceback.format_exc()
    report.send(text)
    sys.stderr.flush()
    os._exit(code)  # a failed one would wait for the others in the clean-up of torch.distributed
