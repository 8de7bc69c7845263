"""A run of several processes without a launcher: this process starts them on its machine, and ends with them."""

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
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from sleeptrain.config.resolved import run_folder
from sleeptrain.config.schema import Config
from sleeptrain.errors import TOLD_IN_A_LINE, ConfigError, exit_code, format_error
from sleeptrain.stop import EXIT_STOPPED, SIGNALS, Stopped, StopRequest, listen, listening
from sleeptrain.terminal import say

if TYPE_CHECKING:  # torch is loaded by those who train
    from sleeptrain.watch.heartbeat import Alarm
    from sleeptrain.watch.heartbeat_store import HeartbeatStore

# How long the others may go on after one worker has failed: long enough to report errors of their own.
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def num_workers(config: Config) -> int:
    """The processes to start here: those of one replica where no launcher has started any, else 0.

    Raises ConfigError where each would need a GPU that is not there.
    """
    from sleeptrain.distributed.launch import find_device, find_place

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
    from sleeptrain.distributed.meeting import open_store
    from sleeptrain.parallel.layout_check import check_layout
    from sleeptrain.train.status import Status
    from sleeptrain.watch.heartbeat_store import HeartbeatStore

    with Status(run_folder(config), writes=True).kept():
        check_layout(config, size)
    # Over the store of this process, which none of the workers takes with it, they meet and are watched.
    store = open_store("127.0.0.1", 0)
    say(f"sleeptrain: no launcher, so {size} processes are started on this machine", sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    workers, reports = list[SpawnProcess](), list[Connection]()
    stopped = False
    with listening() as request:
        # It would be started with the first worker, and stop holding signals back (`_held_back`).
        resource_tracker.ensure_running()
        try:
            for rank in range(size):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (config, rank, size, store.port, request.began, sender)
                worker = context.Process(target=_work, args=arguments, name=f"rank{rank}")
                with _held_back():  # until the worker listens
                    worker.start()
                sender.close()
                workers.append(worker)
                reports.append(receiver)
            with _passing_on(workers, request):
                ending, stopped = _wait(workers, HeartbeatStore(store, size))
        finally:
            for worker in workers:
                _kill(worker)
    if ending is not None:
        Status(run_folder(config), writes=True).end_of_killed(ending.text, ending.code)
        return _tell(ending, workers, reports)
    if stopped:
        raise Stopped
    return 0


def _wait(workers: Sequence[SpawnProcess], board: HeartbeatStore) -> tuple[Alarm | None, bool]:
    """Until all have ended, or the grace after a first failure is over: (why, whether they were stopped)."""
    ending, stopped, deadline = None, False, float("inf")
    running = {worker.sentinel: rank for rank, worker in enumerate(workers)}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=min(left, 60.0)):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            workers[rank].join()
            code = workers[rank].exitcode
            if code == EXIT_STOPPED:
                if not board.is_clear:  # one that is stopped before all have met is waited for by the others
                    _signal_all(workers, signal.SIGTERM)
                stopped = True
            elif code and ending is None:
                ending, deadline = _why(rank, code, board), time.monotonic() + GRACE_SECONDS
    return ending, stopped


def _why(rank: int, code: int, board: HeartbeatStore) -> Alarm:
    """What the watch knows of the end of a worker; else it is told that the worker was ended, and where."""
    from sleeptrain.watch.heartbeat import Alarm, where

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
    say("\n".join(line for line in lines if line), sys.stderr, flush=True)
    return ending.code


@contextlib.contextmanager
def _passing_on(workers: Sequence[SpawnProcess], request: StopRequest) -> Iterator[None]:
    """Signals to this process also reach the workers, which are not in its terminal's group."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

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
    if request.requested:  # while they were started
        _signal_all(workers, signal.SIGTERM)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait; a process that is started here holds them back too, until it says otherwise."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


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


def _loopback() -> str | None:
    """The name of the loopback's interface."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _work(config: Config, rank: int, size: int, port: int, began: float, report: Connection) -> NoReturn:
    """A worker's whole life: its place, the training, its report."""
    listen(StopRequest(began, says=False))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.setsid()  # a Ctrl-C at the terminal comes through the starting process alone
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no worker outlives it
    starter = multiprocessing.parent_process()
    if starter is None or os.getppid() != starter.pid:
        os._exit(1)  # it has died before that was asked for
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # whoever started the process holds the store
    if (loopback := _loopback()) is not None:  # nobody else is to reach what gloo and NCCL listen at
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback)
    import torch

    from sleeptrain.train.trainer import train

    if not config.train.threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    code, text = 0, ""
    try:
        code = train(config)
    except Stopped:
        code = EXIT_STOPPED
    except TOLD_IN_A_LINE as error:
        code, text = exit_code(error), format_error(error)
    except BaseException:
        code, text = 1, traceback.format_exc()
    report.send(text)
    sys.stderr.flush()
    os._exit(code)  # a failed one would wait for the others in the clean-up of torch.distributed
