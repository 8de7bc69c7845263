"""A run of several processes without a launcher: this process starts workers on its machine and waits for them."""

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

if TYPE_CHECKING:  # this process does not load torch; the workers do
    from sleeptrain.watch.heartbeat import Alarm
    from sleeptrain.watch.heartbeat_store import HeartbeatStore

# Seconds that the other workers may go on after one has failed, so that they can report their errors.
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def num_workers(config: Config) -> int:
    """The number of processes to start: those of one model replica; 0 if it is 1 or if a launcher has started them.

    Raises ConfigError if the machine has fewer GPUs than that.
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
    """Start `size` workers that train; return the exit code of the first that fails, or 0.

    When a worker fails or dies, all workers end and its error is shown. Signals are passed on; no worker outlives this
    process. Raises ConfigError for a layout that does not fit, Stopped if all workers have saved after a signal.
    """
    from sleeptrain.distributed.meeting import open_store
    from sleeptrain.parallel.layout_check import check_layout
    from sleeptrain.train.status import Status
    from sleeptrain.watch.heartbeat_store import HeartbeatStore

    with Status(run_folder(config), writes=True).recorded():
        check_layout(config, size)
    # The workers meet and are watched through this store. This process owns it, so it outlives each worker.
    store = open_store("127.0.0.1", 0)
    say(f"sleeptrain: no launcher, so {size} processes are started on this machine", sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    workers, reports = list[SpawnProcess](), list[Connection]()
    stopped = False
    with listening() as request:
        # The first worker would start the tracker, and starting it unblocks the signals (`_signals_blocked`).
        resource_tracker.ensure_running()
        try:
            for rank in range(size):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (config, rank, size, store.port, request.began, sender)
                worker = context.Process(target=_work, args=arguments, name=f"rank{rank}")
                with _signals_blocked():  # the worker unblocks them once it handles them
                    worker.start()
                sender.close()
                workers.append(worker)
                reports.append(receiver)
            with _signals_passed_on(workers, request):
                ending, stopped = _wait(workers, HeartbeatStore(store, size))
        finally:
            for worker in workers:
                _kill(worker)
    if ending is not None:
        Status(run_folder(config), writes=True).end_of_killed(ending.text, ending.code)
        return _report_end(ending, workers, reports)
    if stopped:
        raise Stopped
    return 0


def _wait(workers: Sequence[SpawnProcess], heartbeats: HeartbeatStore) -> tuple[Alarm | None, bool]:
    """Wait until all workers have ended, or until GRACE_SECONDS after a first failure.

    Returns the alarm of the first failure, if any, and True if a worker was stopped by a signal.
    """
    ending, stopped, deadline = None, False, float("inf")
    running = {worker.sentinel: rank for rank, worker in enumerate(workers)}
    while running and (remaining := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=min(remaining, 60.0)):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            workers[rank].join()
            code = workers[rank].exitcode
            if code == EXIT_STOPPED:
                if not heartbeats.is_clear:  # the workers have not met: the others would wait for this one
                    _signal_all(workers, signal.SIGTERM)
                stopped = True
            elif code and ending is None:
                ending, deadline = _alarm_of(rank, code, heartbeats), time.monotonic() + GRACE_SECONDS
    return ending, stopped


def _alarm_of(rank: int, code: int, heartbeats: HeartbeatStore) -> Alarm:
    """The alarm for the end of a worker: the alarm that the watch has raised, else a new one."""
    from sleeptrain.watch.heartbeat import Alarm, where

    if not heartbeats.is_clear:  # the workers had not met
        return Alarm("lost", (rank,), f"rank {rank} {_ended_by(code)} before all had met", _exit_code(code))
    (beat,), _ = heartbeats.read([rank])
    return heartbeats.raise_alarm(
        Alarm("lost", (rank,), f"rank {rank} {_ended_by(code)} {where(beat)}", _exit_code(code))
    )


def _ended_by(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _exit_code(code: int) -> int:
    """The exit code as in a shell. code: multiprocessing's, which is negative for a signal."""
    return 128 - code if code < 0 else code


def _report_end(ending: Alarm, workers: Sequence[SpawnProcess], reports: Sequence[Connection]) -> int:
    """Print why the run has ended, with the failed worker's report if there is one; return the exit code."""
    rank, report = ending.ranks[0], ""
    with contextlib.suppress(EOFError):
        report = reports[rank].recv() if reports[rank].poll() else ""
    lines = [report.rstrip(), f"sleeptrain: process {rank} of {len(workers)} failed, and all have been ended"]
    if not report or "Traceback" in report:
        lines.insert(1, f"sleeptrain: {ending.text}")
    say("\n".join(line for line in lines if line), sys.stderr, flush=True)
    return ending.code


@contextlib.contextmanager
def _signals_passed_on(workers: Sequence[SpawnProcess], request: StopRequest) -> Iterator[None]:
    """Pass signals on to the workers: they are not in the terminal's process group."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal_all(workers, number)
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def pause(number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: stop the workers, too, since they need this process's store."""
        _signal_all(workers, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        _signal_all(workers, signal.SIGCONT)

    handlers[signal.SIGTSTP] = signal.getsignal(signal.SIGTSTP)
    for number in handlers:
        signal.signal(number, pause if number == signal.SIGTSTP else pass_on)
    if request.requested:  # a signal came while the workers were started
        _signal_all(workers, signal.SIGTERM)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals; a process that is started inside begins with them blocked."""
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
    """Kill a worker and the processes that it started, and wait for its end."""
    if worker.pid is not None and worker.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()
    worker.join()


def _loopback() -> str | None:
    """The name of the loopback interface; None if there is none."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _work(config: Config, rank: int, size: int, port: int, began: float, report: Connection) -> NoReturn:
    """The main function of a worker: set its rank, train, send its report, and exit."""
    listen(StopRequest(began, says=False))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.setsid()  # only the parent gets a terminal's Ctrl-C and passes it on
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the kernel kills the worker when the parent dies
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)  # the parent died before prctl
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the parent holds the store
    if (loopback := _loopback()) is not None:  # no other machine can then reach the ports of gloo and NCCL
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
    os._exit(code)  # after a failure, the clean-up of torch.distributed would wait for the other workers
