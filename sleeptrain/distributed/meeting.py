"""How the processes of a run meet: at a store of rank 0 or the launcher, in bounded time, while signals are heard."""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import itertools
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch.distributed as dist

from sleeptrain.distributed.world import name_ranks
from sleeptrain.errors import MeetingError
from sleeptrain.stop import Stopped, StopRequest

T = TypeVar("T")

# Seconds that the first process waits for the last one; `health.timeout` counts if it is shorter.
MEET_WITHIN = 300.0
# Seconds in which a store answers. If none answers, another program has the port.
ANSWER_WITHIN = 20.0
RETRY = timedelta(seconds=1)
# Seconds after a signal in which processes that have all arrived may finish initialisation.
FINISH_WITHIN = 2.0
# Seconds between two checks.
POLL = 0.1
# Connections that may wait to be accepted: enough for all processes of a run.
BACKLOG = 4096

# A launcher's store outlives a run, and a sweep has several runs: each meeting of this process uses its own keys.
_meetings = itertools.count()


@dataclass
class Limit:
    """The deadline of a thread's current work.

    until: the deadline, in seconds of time.monotonic().
    text: the message of the error after the deadline.
    """

    until: float = math.inf
    text: str = ""

    @contextlib.contextmanager
    def of(self, seconds: float, text: str) -> Iterator[None]:
        """Sets the deadline for the length of the block."""
        self.text, self.until = text, time.monotonic() + seconds
        yield
        self.until = math.inf


def while_listening(function: Callable[[Limit], T], request: StopRequest) -> T:
    """Runs `function` in a second thread and returns its value. The calling thread hears signals while that one waits.

    Raises Stopped soon after a signal, and MeetingError after the function's limit. The second thread may then be in a
    call that never returns; the process is about to end.
    """
    limit, call = Limit(), _Call(function)
    threading.Thread(target=call.run, args=(limit,), name="meeting", daemon=True).start()
    stop_at = math.inf
    while not call.done.wait(POLL):
        now = time.monotonic()
        if request.requested:
            stop_at = min(stop_at, now + FINISH_WITHIN)
        if now >= stop_at:
            raise Stopped
        if now >= limit.until:
            raise MeetingError(limit.text)
    return call.result()


class _Call(Generic[T]):
    """A call in another thread, and its result or error."""

    def __init__(self, function: Callable[[Limit], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.done = threading.Event()

    def run(self, limit: Limit) -> None:
        try:
            self._results.append(self._function(limit))
        except BaseException as error:
            self._error = error
        self.done.set()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results[0]


def meet(rank: int, size: int, run: str, seconds: float, limit: Limit) -> dist.Store:
    """Waits for all processes of the run at MASTER_ADDR and MASTER_PORT, and returns a store with the run's own keys.

    run: a name that tells the run from others that meet at the same port. Raises MeetingError after `seconds`, and at
    once if another program has the port.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + seconds
    # Else torchrun, or the process that started its own workers, holds the store.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _cached_store(address, port) if holds else _connect(address, port, until, limit)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run_store = dist.PrefixStore(f"sleeptrain/{run}/{attempt}/{next(_meetings)}", store)
    try:
        _await_all(run_store, rank, size, until, f"{address} port {port}")
    except dist.DistNetworkError:
        raise MeetingError(f"rank 0, or the launcher with the store at {address} port {port}, has ended") from None
    return run_store


def open_store(address: str, port: int) -> dist.TCPStore:
    """A store in this process that listens on the interface of the address. Port 0: any free port.

    Raises MeetingError if it cannot listen there.
    """
    with _listener(address, port) as listener:
        host, port, *_ = listener.getsockname()
        store_host = "127.0.0.1" if ipaddress.ip_address(host).is_unspecified else host
        store = dist.TCPStore(store_host, port, None, True, wait_for_workers=False, master_listen_fd=listener.fileno())
        listener.detach()  # the store closes it
    return store


# Kept until the process ends: the next run of a sweep meets at the same port.
_cached_store = functools.cache(open_store)


def _listener(address: str, port: int) -> socket.socket:
    """A socket bound to the address if this machine has it, else to all interfaces.

    Other machines may reach this one under a translated address, or by a name that only this machine resolves to its
    loopback (Debian's 127.0.1.1).
    """
    try:
        infos = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MeetingError(
            f"MASTER_ADDR={address} does not resolve here ({error.strerror}): export a name of rank 0's machine"
        ) from None
    for family, *_, socket_address in infos:
        host = str(socket_address[0])
        if ipaddress.ip_address(host.partition("%")[0]).is_loopback and address not in (host, "localhost"):
            continue
        with contextlib.suppress(_NotLocal):
            return _bound(host, port, family)
    if socket.has_dualstack_ipv6():
        return _bound("::", port, socket.AF_INET6, dualstack_ipv6=True)
    return _bound("0.0.0.0", port, socket.AF_INET)


class _NotLocal(Exception):
    """No interface of this machine has the address."""


def _bound(host: str, port: int, family: int, dualstack_ipv6: bool = False) -> socket.socket:
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dualstack_ipv6)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise _NotLocal from None
        raise MeetingError(
            f"port {port} of {host}, where the processes of this run are to meet, cannot be opened: "
            f"{os.strerror(error.errno or 0)}. Export another MASTER_PORT, or end the program that has it "
            f"(ss -ltnp 'sport = :{port}' names it)"
        ) from None


def _connect(address: str, port: int, until: float, limit: Limit) -> dist.Store:
    """Connects to the store at the address once a process listens there. Raises MeetingError."""
    place = f"{address} port {port}"
    while True:
        try:
            socket.create_connection((address, port), timeout=ANSWER_WITHIN).close()
            break
        except OSError as error:
            if time.monotonic() >= until:
                raise MeetingError(
                    f"rank 0 does not listen at {place} ({error.strerror or error}): it has not started, or this "
                    "machine cannot reach it; MASTER_ADDR must name rank 0's machine in all processes"
                ) from None
            time.sleep(POLL)
    text = (
        f"another program answers at {place}, where the processes of this run are to meet: export another MASTER_PORT, "
        f"or end that program (on that machine, ss -ltnp 'sport = :{port}' names it)"
    )
    # TCPStore waits without end for a program that does not answer, so the limit ends it; a wrong answer ends in RETRY.
    with limit.of(ANSWER_WITHIN, text):
        try:
            return dist.TCPStore(address, port, None, False, timeout=RETRY, wait_for_workers=False)
        except dist.DistError:
            raise MeetingError(text) from None


def _await_all(store: dist.Store, rank: int, size: int, until: float, place: str) -> None:
    """Waits until all processes have come: rank 0 waits for a key of each rank, the others for rank 0's key `all`."""
    store.set(str(rank), "")
    keys = list(map(str, range(size))) if rank == 0 else ["all"]
    while not store.check(keys):
        if time.monotonic() >= until:
            missing = [r for r in range(size) if not store.check([str(r)])]
            count = f"{size - len(missing)} of {size} processes have come to {place} in time; "
            raise MeetingError(count + (f"missing: {name_ranks(missing)}" if missing else "rank 0 was late"))
        time.sleep(POLL)
    if rank == 0:
        store.set("all", "")
