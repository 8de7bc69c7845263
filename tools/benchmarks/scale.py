"""The start and the exchanges of a run over many processes, counted: sockets, the store, messages, weights drawn.

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

from benchmarks import Row
from sleeptrain.config.compose import compose
from sleeptrain.distributed.descriptors import descriptors_needed
from sleeptrain.distributed.launch import LAZY_GLOO
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.undrawn import undrawn
from sleeptrain.parallel.zero.matrix_exchange import assign_owners

METHOD = "counted in forks at 32 and 128 processes, computed beyond; no times"
COUNTED, COMPUTED = (32, 128), (256, 1024, 4096)
ALL_WITH_ALL = 32  # counted only here: each doubling takes four times as many connections
PATIENCE = timedelta(minutes=5)
EXPERIMENT, VOCABULARY, TENSOR = "pretrain_7b", 65536, 2
GIB, KIB = 2**30, 2**10
# Exchanges of a step over all processes, and before values were joined and small sums had an algorithm of their own.
EXCHANGES, EARLIER_EXCHANGES = 1, 4
# Assumed for a message of gloo between two machines, with what Python does for it. gloo's own rings are quicker.
MESSAGE_MS, RING_MESSAGE_MS = 0.5, 0.05


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
    for size in COMPUTED:
        rows += _computed_rows(size)
    return rows


def _counted_rows(size: int, counted: Sequence[Counted]) -> list[Row]:
    first, *others = counted
    store, messages = sum(c.store_bytes for c in counted) / KIB, EXCHANGES * max(c.messages for c in counted)
    return [
        _row(size, "sockets of rank 0", first.sockets, "", 2 * size + 64),
        _row(size, "sockets of the fullest other process", max(c.sockets for c in others), "", 64),
        _row(size, "sent by the store", store, "KiB", 8 * size),
        _row(size, "messages in a row, a step", messages, "", EXCHANGES * size.bit_length()),
    ]


def _computed_rows(size: int) -> list[Row]:
    replicas = size // TENSOR
    sizes = _weight_sizes()
    owners = assign_owners(sizes, replicas)
    loads = [0.0] * replicas
    for name, owner in owners.items():
        loads[owner] += sizes[name]
    whole = sum(sizes.values()) / GIB
    messages, earlier = EXCHANGES * (size - 1).bit_length(), EARLIER_EXCHANGES * 2 * (size - 1)
    return [
        _row(size, "open files that rank 0 needs", descriptors_needed(size), "", 65536),
        _row(size, "all with all: sockets of a process", 2 * (size - 1), ""),
        _row(size, "messages in a row, a step", messages, "", 16),
        _row(size, "by gloo's rings: messages in a row, a step", earlier, ""),
        _row(size, "exchange of a step, at 0.5 ms a message", messages * MESSAGE_MS, "ms", 20),
        _row(size, "by gloo's rings: exchanges of a step, at 0.05 ms a message", earlier * RING_MESSAGE_MS, "ms"),
        _row(size, f"{EXPERIMENT}: drawn by a process", max(loads) / GIB, "GiB", whole / 8),
        _row(size, f"{EXPERIMENT}: drawn by a process alone", whole, "GiB"),
    ]


def _row(size: int, name: str, value: float, unit: str, goal: float | None = None) -> Row:
    return Row(f"{size} processes: {name}", value, unit, goal, "lower")


def _weight_sizes() -> dict[str, float]:
    """Bytes of each parameter that a process draws, by name: a whole parameter is drawn, and a rank keeps its shard."""
    config = compose([f"experiment={EXPERIMENT}", "run.name=counted"])
    config.model.vocab_size = VOCABULARY
    with undrawn(torch.device("meta")):
        model = Hybrid(config.model)
    return {name: 4.0 * p.numel() for name, p in model.named_parameters()}


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
