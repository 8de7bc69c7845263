"""How the processes of a run meet: at a store that rank 0 or the launcher holds, in bounded time, open to signals."""

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

# Seconds that the first process to arrive waits for the last one; fewer where `health.timeout` is shorter.
MEET_WITHIN = 300.0
# Seconds in which a store answers; what does not is another program.
ANSWER_WITHIN = 20.0
RETRY = timedelta(seconds=1)
# Seconds in which processes that have all come may finish what they began, after a signal.
FINISH_WITHIN = 2.0
# Seconds between two looks.
POLL = 0.1
# Connections that may wait to be accepted: those of all processes of a run.
BACKLOG = 4096

# A launcher's store outlives a run, and a sweep has several: each meeting of this process has keys of its own.
_meetings = itertools.count()


@dataclass
class Limit:
    """Until when (time.monotonic()) a thread may go on with what it does, and what is said when that is over."""

    until: float = math.inf
    text: str = ""

    @contextlib.contextmanager
    def of(self, seconds: float, text: str) -> Iterator[None]:
        """For the length of the block."""
        self.text, self.until = text, time.monotonic() + seconds
        yield
        self.until = math.inf


def while_listening(function: Callable[[Limit], T], request: StopRequest) -> T:
    """The value of `function`, which runs in a thread: this one hears signals while that one waits for others.

    Raises Stopped soon after a signal, and MeetingError when the function's limit is over. The thread may then be in a
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
    """A call in another thread, and what has become of it."""

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
    """A store of the run's own, once all its processes have come to MASTER_ADDR and MASTER_PORT.

    run: what tells the run from another that meets there. Raises MeetingError after `seconds`, and at once where the
    port is another program's.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + seconds
    # torchrun, or the process that has started its own workers, holds the store.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _kept_store(address, port) if holds else _reach(address, port, until, limit)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"sleeptrain/{run}/{attempt}/{next(_meetings)}", store)
    try:
        _await_all(own, rank, size, until, f"{address} port {port}")
    except dist.DistNetworkError:
        raise MeetingError(f"rank 0, or whoever holds the store at {address} port {port}, has ended") from None
    return own


def open_store(address: str, port: int) -> dist.TCPStore:
    """A store of this process, which listens on the interface that the address names; port 0 is any free one.

    Raises MeetingError.
    """
    with _listener(address, port) as listener:
        host, port, *_ = listener.getsockname()
        own = "127.0.0.1" if ipaddress.ip_address(host).is_unspecified else host
        store = dist.TCPStore(own, port, None, True, wait_for_workers=False, master_listen_fd=listener.fileno())
        listener.detach()  # the store closes it
    return store


# To the end of the process, so that the next run of a sweep meets at the same port.
_kept_store = functools.cache(open_store)


def _listener(address: str, port: int) -> socket.socket:
    """A socket bound to the address, where it is one of this machine's; else to all.

    Others may reach this machine under an address that is translated on the way, or by a name that this machine alone
    takes for its loopback (Debian's 127.0.1.1).
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MeetingError(
            f"MASTER_ADDR={address} has no address here ({error.strerror}): export a name of rank 0's machine"
        ) from None
    for family, *_, place in found:
        host = str(place[0])
        if ipaddress.ip_address(host.partition("%")[0]).is_loopback and address not in (host, "localhost"):
            continue
        with contextlib.suppress(_NotOurs):
            return _bound(host, port, family)
    if socket.has_dualstack_ipv6():
        return _bound("::", port, socket.AF_INET6, dualstack_ipv6=True)
    return _bound("0.0.0.0", port, socket.AF_INET)


class _NotOurs(Exception):
    """No interface of this machine has the address."""


def _bound(host: str, port: int, family: int, dualstack_ipv6: bool = False) -> socket.socket:
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dualstack_ipv6)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise _NotOurs from None
        raise MeetingError(
            f"port {port} of {host}, where the processes of this run are to meet, cannot be had: "
            f"{os.strerror(error.errno or 0)}. Export another MASTER_PORT, or end the program that has it "
            f"(ss -ltnp 'sport = :{port}' names it)"
        ) from None


def _reach(address: str, port: int, until: float, limit: Limit) -> dist.Store:
    """The store at the address, once somebody listens there."""
    place = f"{address} port {port}"
    while True:
        try:
            socket.create_connection((address, port), timeout=ANSWER_WITHIN).close()
            break
        except OSError as error:
            if time.monotonic() >= until:
                raise MeetingError(
                    f"rank 0 does not listen at {place} ({error.strerror or error}): it has not started, or this "
                    "machine cannot reach it; MASTER_ADDR is to be rank 0's machine for all processes"
                ) from None
            time.sleep(POLL)
    text = (
        f"another program answers at {place}, where the processes of this run are to meet: export another MASTER_PORT, "
        f"or end that program (on that machine, ss -ltnp 'sport = :{port}' names it)"
    )
    # What does not answer is waited for without end, which the limit ends; what answers wrongly is asked for RETRY.
    with limit.of(ANSWER_WITHIN, text):
        try:
            return dist.TCPStore(address, port, None, False, timeout=RETRY, wait_for_workers=False)
        except dist.DistError:
            raise MeetingError(text) from None


def _await_all(store: dist.Store, rank: int, size: int, until: float, place: str) -> None:
    """Until all have come; rank 0 looks for them, and the others for its word."""
    store.set(str(rank), "")
    wanted = list(map(str, range(size))) if rank == 0 else ["all"]
    while not store.check(wanted):
        if time.monotonic() >= until:
            missing = [r for r in range(size) if not store.check([str(r)])]
            came = f"{size - len(missing)} of {size} processes have come to {place} in time; "
            raise MeetingError(came + (f"missing: {name_ranks(missing)}" if missing else "rank 0 was late"))
        time.sleep(POLL)
    if rank == 0:
        store.set("all", "")
