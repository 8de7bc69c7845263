"""Reads of a checkpoint that are shared: what several data ranks need, one of them reads and sends to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.place import Place
from sleeptrain.checkpoint.read import SavedTensors
from sleeptrain.distributed.mesh import Axis
from sleeptrain.parallel.zero.matrix_exchange import assign_owners


class Wanted(NamedTuple):
    """Elements of a tensor of a checkpoint. take: receives them, flat, in the tensor's dtype."""

    name: str
    place: Place
    take: Callable[[torch.Tensor], object]


def share_reads(saved: SavedTensors, wanted: Sequence[Wanted], data: Axis, device: torch.device) -> None:
    """Read the elements and give each to its `take`, on `device`. All processes of `data` want the same ones.

    Each process reads about equally many bytes, one tensor ahead of its turn. So it holds two at a time, and a tensor
    is read while others are sent. If a process cannot read, all go on to the end, so that none waits; then that process
    raises the error.
    """
    if data.size == 1:
        for one in wanted:
            one.take(saved.elements(one.name, one.place).to(device))
        return
    owners = assign_owners({one.name: one.place.numel for one in wanted}, data.size)
    raised: Exception | None = None
    with ThreadPoolExecutor(1) as pool:
        own = _ahead(pool, saved, [one for one in wanted if owners[one.name] == data.rank])
        for one in wanted:
            values = torch.zeros(one.place.numel, dtype=saved.forms[one.name].dtype, device=device)
            if owners[one.name] == data.rank:
                try:
                    values.copy_(next(own).result())
                except Exception as error:
                    raised = raised or error
            source = owners[one.name] if data.group is None else dist.get_global_rank(data.group, owners[one.name])
            dist.broadcast(values, source, group=data.group)
            one.take(values)
    if raised is not None:
        raise raised


def _ahead(pool: ThreadPoolExecutor, saved: SavedTensors, wanted: Sequence[Wanted]) -> Iterator[Future[torch.Tensor]]:
    """The reads of these elements, in order, each begun when the one before is taken."""
    started = [pool.submit(saved.elements, one.name, one.place) for one in wanted[:1]]
    for index in range(len(wanted)):
        current = started.pop()
        current.exception()  # wait
        started += [pool.submit(saved.elements, one.name, one.place) for one in wanted[index + 1 : index + 2]]
        yield current
