"""Ranks that are threads of the test process: their messages go through shared memory."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = 60.0


class Link:
    """The messages from one rank to another, matched in the order in which both sides posted them."""

    def __init__(self) -> None:
        self.sent: Queue[torch.Tensor] = Queue()
        self.expected: list[torch.Tensor] = []

    def fill(self, into: torch.Tensor) -> None:
        """Wait for this message, and so for all before it."""
        while any(tensor is into for tensor in self.expected):
            self.expected.pop(0).copy_(self.sent.get(timeout=PATIENCE))


class SharedState:
    """The state that the ranks share."""

    def __init__(self, size: int):
        self.posted: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.links: dict[tuple[int, int], Link] = defaultdict(Link)


class Group:
    """All ranks, seen from one rank. moved: the elements that this rank sent to others in `all_to_all_single`."""

    def __init__(self, rank: int, size: int, shared: SharedState):
        self.rank, self.size, self.shared, self.moved = rank, size, shared, 0

    def exchange(self, value: Any) -> list[Any]:
        self.shared.posted[self.rank] = value
        self.shared.barrier.wait()
        values = list(self.shared.posted)
        self.shared.barrier.wait()
        return values


class Work:
    """A message on its way."""

    def __init__(self, finish: Callable[[], None]):
        self._finish = finish

    def wait(self) -> None:
        self._finish()

    def is_completed(self) -> bool:
        return False


def _all_gather_object(values: list[Any], value: Any, group: Group) -> None:
    values[:] = group.exchange(value)


def _gather(tensor: torch.Tensor, into: list[torch.Tensor] | None, to: int, group: Group) -> None:
    assert (into is not None) == (to == group.rank)
    for target, source in zip(into or (), group.exchange(tensor.clone()), strict=False):
        target.copy_(source)


def _all_reduce(tensor: torch.Tensor, group: Group) -> None:
    tensor.copy_(torch.stack(group.exchange(tensor.clone())).sum(0))


def _all_to_all(into: torch.Tensor, out: torch.Tensor, into_sizes: list[int], sizes: list[int], group: Group) -> None:
    group.moved += sum(numel for peer, numel in enumerate(sizes) if peer != group.rank)
    parts = [posted[group.rank] for posted in group.exchange(out.split(sizes))]
    assert [part.numel() for part in parts] == into_sizes
    into.copy_(torch.cat(parts))


def _isend(tensor: torch.Tensor, to: int, group: Group) -> Work:
    assert tensor.is_contiguous()
    group.shared.links[group.rank, to].sent.put(tensor)
    return Work(lambda: None)


def _irecv(into: torch.Tensor, source: int, group: Group) -> Work:
    link = group.shared.links[source, group.rank]
    link.expected.append(into)
    return Work(lambda: link.fill(into))


def run_threads(patch: pytest.MonkeyPatch, size: int, function: Callable[[Any], T]) -> list[T]:
    """Calls `function(group)` on each of `size` ranks at the same time and returns what they returned, by rank."""
    for name, stand_in in {
        "get_world_size": lambda group: group.size,
        "get_rank": lambda group: group.rank,
        "get_global_rank": lambda group, rank: rank,
        "all_gather_object": _all_gather_object,
        "gather": _gather,
        "all_reduce": _all_reduce,
        "all_to_all_single": _all_to_all,
        "isend": _isend,
        "irecv": _irecv,
    }.items():
        patch.setattr(dist, name, stand_in)
    shared = SharedState(size)

    def run(rank: int) -> T:
        try:
            return function(Group(rank, size, shared))
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(run, rank) for rank in range(size)]
    failures = [error for rank in ranks if (error := rank.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [rank.result() for rank in ranks]
