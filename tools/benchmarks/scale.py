"""A run over many processes, counted: sockets, the store, messages; checkpoints, a resume and links (`scale_counts`).

Forks open the groups of a run over all processes and use them as a run does: a step's exchanges, values of the first
and last process, and the gathering of a checkpoint's plan. What each has open is counted in /proc, and what the store
sends in front of it. Larger worlds are computed: a process communicates with the same neighbours, and with one more
at each doubling. "All with all" is what gloo does by default.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import Row, scale_counts
from benchmarks.scale_counts import EXCHANGES
from sleeptrain.distributed.launch import LAZY_GLOO
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World

METHOD = "sockets and messages counted in forks at 32 and 128 processes, all else computed; no times measured"
COUNTED = (32, 128)
ALL_WITH_ALL = 32  # counted only here: each doubling takes four times as many connections
PATIENCE = timedelta(minutes=5)
KIB = 2**10


class Counted(NamedTuple):
    """What one process has counted. messages: those that it has received one after the other in one exchange."""

    sockets: int
    store_bytes: int
    messages: int


class _CountingStore(dist.Store):
    """A store that counts the bytes that it gives to gloo."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store, self.num_bytes = store, 0

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        self.num_bytes += len(value)
        return value

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def wait(self, *arguments: Any) -> None:
        self._store.wait(*arguments)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    @property
    def timeout(self) -> timedelta:
        return PATIENCE


def run(quick: bool) -> list[Row]:
    rows = []
    for size in COUNTED[: 1 if quick else None]:
        rows += _counted_rows(size, _count(size, lazy=True))
    before = _count(ALL_WITH_ALL, lazy=False)
    rows.append(_row(ALL_WITH_ALL, "all with all: sockets of a process", max(c.sockets for c in before), ""))
    rows.append(_row(ALL_WITH_ALL, "all with all: sent by the store", sum(c.store_bytes for c in before) / KIB, "KiB"))
    return rows + scale_counts.rows()


def _counted_rows(size: int, counted: Sequence[Counted]) -> list[Row]:
    first, *others = counted
    store, messages = sum(c.store_bytes for c in counted) / KIB, EXCHANGES * max(c.messages for c in counted)
    return [
        _row(size, "sockets of rank 0", first.sockets, "", 2 * size + 64),
        _row(size, "sockets of the fullest other process", max(c.sockets for c in others), "", 64),
        _row(size, "sent by the store", store, "KiB", 8 * size),
        _row(size, "messages in a row, a step", messages, "", EXCHANGES * size.bit_length()),
    ]


def _row(size: int, name: str, value: float, unit: str, goal: float | None = None) -> Row:
    return Row(f"{size} processes: {name}", value, unit, goal, "lower")


def _count(size: int, lazy: bool) -> list[Counted]:
    """What each of `size` forks has counted, by rank. Raises RuntimeError if one fails.

    This process starts no thread, and so no store, before it forks.
    """
    context = multiprocessing.get_context("fork")
    results: Queue[tuple[int, Counted | str]] = context.Queue()
    with socket.create_server(("127.0.0.1", 0), backlog=4 * size) as listener:
        forks = [
            context.Process(target=_work, args=(rank, size, listener, lazy, results), daemon=True)
            for rank in range(size)
        ]
        try:
            for fork in forks:
                fork.start()
            found = dict(results.get(timeout=PATIENCE.total_seconds()) for _ in forks)
        finally:
            for fork in forks:
                fork.kill()
                fork.join()
    if failures := [counted for counted in found.values() if isinstance(counted, str)]:
        raise RuntimeError(failures[0])
    return [counted for _, counted in sorted(found.items()) if not isinstance(counted, str)]


def _work(rank: int, size: int, listener: socket.socket, lazy: bool, results: Queue[tuple[int, Counted | str]]) -> None:
    try:
        results.put((rank, _counted(rank, size, listener, lazy)))
    except Exception as error:
        results.put((rank, str(error)))
    time.sleep(PATIENCE.total_seconds())  # others may still need this process; it is killed when all have counted


def _counted(rank: int, size: int, listener: socket.socket, lazy: bool) -> Counted:
    os.environ |= {LAZY_GLOO: "1" if lazy else "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    store = _CountingStore(_store(rank, listener))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    sockets, num_bytes = _open_sockets(), store.num_bytes
    control, saving = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    world = World(Mesh.single(), torch.device("cpu"), rank, size, control, saving)
    messages = _messages_of_a_sum(world)
    world.from_first(rank)
    world.from_last(rank)
    for group in (control, saving):
        world.all_or_raise(lambda: None, group)
    dist.gather_object(rank, [None] * size if rank == 0 else None, group=saving)
    dist.scatter_object_list([None], [None] * size if rank == 0 else None, group=saving)
    dist.barrier(group=control)
    return Counted(_open_sockets() - sockets, store.num_bytes - num_bytes, messages)


def _store(rank: int, listener: socket.socket) -> dist.TCPStore:
    """The store, which rank 0 holds at the parent's port."""
    host, port = listener.getsockname()
    if rank == 0:
        return dist.TCPStore(
            host, port, None, True, PATIENCE, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    listener.close()
    return dist.TCPStore(host, port, None, False, PATIENCE, wait_for_workers=False)


def _messages_of_a_sum(world: World) -> int:
    """The messages that this process receives, each after the one before it, in a sum over all processes."""
    receive, received = dist.recv, [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        received[0] += 1
        return receive(*arguments, **options)

    dist.recv = counted
    try:
        world.sum(1.0)
    finally:
        dist.recv = receive
    return received[0]


def _open_sockets() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.lexists(link))
