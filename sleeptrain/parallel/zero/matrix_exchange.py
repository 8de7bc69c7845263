"""Exchange of fragments, so that Muon can work on full matrices although ZeRO has cut them into flat partitions.

Every process holds fragments of matrices. Each matrix has one owner. All processes send their fragments of it (of
tensor parallel shards, too) to the owner; the owner joins them, works on the matrix once, and sends the fragments back.
This takes one all-to-all each way.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.place import Slice
from sleeptrain.optim.muon import Blocks


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, at `offset` of a flat tensor."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Holding:
    """The fragments of one process.

    shard: its tensor parallel rank.
    shapes: the shape of its tensor parallel shard of each parameter, also without a fragment of it.
    fragments: its fragments of these shards.
    """

    shard: int
    shapes: Mapping[str, tuple[int, ...]]
    fragments: tuple[Fragment, ...]


class Shards(Protocol):
    """How tensor parallel shards form a full parameter."""

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def take(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor: ...

    def part(self, name: str, shape: Sequence[int], rank: int) -> Slice:
        """The part of a full parameter of this shape that a rank's shard holds, without padding at its end."""


class Unsharded:
    """No tensor parallelism: the only shard is the full parameter."""

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        (whole,) = shards
        return whole

    def take(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        return whole

    def part(self, name: str, shape: Sequence[int], rank: int) -> Slice:
        return Slice.cut(shape)


class LayoutError(RuntimeError):
    """The processes' fragments do not form full parameters."""


# Called with the matrices that a process owns, by name; changes them in place.
Work = Callable[[dict[str, torch.Tensor]], None]


class Exchange:
    """Sends every fragment to the owner of its matrix and back.

    holdings: the fragments of each process of the group, by rank.
    owners: the rank that owns each parameter.
    rank, group: this process's rank in its group.
    Raises LayoutError unless the fragments of each shard cover it exactly; copies of one fragment in several processes
    count as one.
    """

    def __init__(
        self,
        holdings: Sequence[Holding],
        owners: Mapping[str, int],
        shards: Shards,
        rank: int,
        group: dist.ProcessGroup | None = None,
    ):
        self._holdings, self._shards, self._rank, self._group = holdings, shards, rank, group
        self.owned = [name for name, owner in owners.items() if owner == rank]
        ranks = range(len(holdings))
        senders = {name: _senders(name, owner, holdings) for name, owner in owners.items()}
        # Sender and receiver list the fragments in the same order: that of the names in `owners`.
        self._to_owners = [[f for n, o in owners.items() if o == to for f in senders[n].get(rank, ())] for to in ranks]
        self._to_own = [[f for n in self.owned for f in senders[n].get(source, ())] for source in ranks]
        by_name = [_by_name(holding) for holding in holdings]
        self._to_holders = [[f for n in self.owned for f in by_name[to].get(n, ())] for to in ranks]
        self._from_owners = [
            [f for n, o in owners.items() if o == source for f in by_name[rank].get(n, ())] for source in ranks
        ]

    def __call__(self, flat: torch.Tensor, work: Work) -> torch.Tensor:
        """Apply `work` to the full matrices of `flat` [numel]; the result [numel] is zero outside the fragments."""
        outgoing = [flat[f.offset : f.offset + f.numel] for part in self._to_owners for f in part]
        arrived = self._send(flat, outgoing, self._to_owners, self._to_own)
        shards = self._assemble(flat, arrived)
        matrices = {n: self._shards.join(n, [shards[n, s] for s in self._shards_of(n)]) for n in self.owned}
        work(matrices)
        results = {(n, s): self._shards.take(n, matrices[n], s).reshape(-1) for n, s in shards}
        outgoing = [
            results[f.name, self._holdings[to].shard][f.start : f.start + f.numel]
            for to, part in enumerate(self._to_holders)
            for f in part
        ]
        arrived = self._send(flat, outgoing, self._to_holders, self._from_owners)
        result = torch.zeros_like(flat)
        for f, piece in zip((f for part in self._from_owners for f in part), arrived, strict=True):
            result[f.offset : f.offset + f.numel] = piece
        return result

    def _shards_of(self, name: str) -> list[int]:
        return sorted({h.shard for h in self._holdings if name in h.shapes})

    def _assemble(self, like: torch.Tensor, arrived: Iterator[torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        """The shards of the matrices that this process owns, by (name, tensor rank)."""
        shards: dict[tuple[str, int], torch.Tensor] = {}
        for holding in self._holdings:
            for name in self.owned:
                if (name, holding.shard) not in shards:
                    shards[name, holding.shard] = like.new_empty(holding.shapes[name])
        for source, part in enumerate(self._to_own):
            for f in part:
                target = shards[f.name, self._holdings[source].shard].view(-1)
                target[f.start : f.start + f.numel] = next(arrived)
        return shards

    def _send(
        self,
        like: torch.Tensor,
        pieces: Sequence[torch.Tensor],
        outgoing: Sequence[Sequence[Fragment]],
        incoming: Sequence[Sequence[Fragment]],
    ) -> Iterator[torch.Tensor]:
        """Send the pieces by one all-to-all and return the received pieces, in the order of `incoming`."""
        send_buffer = torch.cat([like.new_empty(0), *pieces])
        sizes = [[sum(f.numel for f in part) for part in way] for way in (incoming, outgoing)]
        if len(self._holdings) == 1:
            buffer = send_buffer
        else:
            buffer = like.new_empty(sum(sizes[0]))
            dist.all_to_all_single(buffer, send_buffer, sizes[0], sizes[1], group=self._group)
        return iter(buffer.split([f.numel for part in incoming for f in part]))


def _by_name(holding: Holding) -> dict[str, list[Fragment]]:
    by_name: dict[str, list[Fragment]] = {}
    for f in holding.fragments:
        by_name.setdefault(f.name, []).append(f)
    return by_name


def _senders(name: str, owner: int, holdings: Sequence[Holding]) -> dict[int, list[Fragment]]:
    """The fragments of `name` that each rank sends. Of several copies the owner's is preferred: it is not sent."""
    chosen: dict[int, list[Fragment]] = {}
    seen: dict[int, set[tuple[int, int]]] = {}
    for rank in sorted(range(len(holdings)), key=lambda r: (r != owner, r)):
        holding = holdings[rank]
        spans = seen.setdefault(holding.shard, set())
        for f in holding.fragments:
            if f.name == name and (f.start, f.numel) not in spans:
                spans.add((f.start, f.numel))
                chosen.setdefault(rank, []).append(f)
    for shard, spans in seen.items():
        numel = next(math.prod(h.shapes[name]) for h in holdings if h.shard == shard)
        _check_cover(name, shard, spans, numel)
    return chosen


def _check_cover(name: str, shard: int, spans: set[tuple[int, int]], numel: int) -> None:
    position = 0
    for start, size in sorted(spans):
        if start != position:
            break
        position += size
    else:
        if position == numel:
            return
    raise LayoutError(
        f"the fragments {sorted(spans)} of {name} (tensor rank {shard}) do not cover its {numel} elements exactly once"
    )


def assign_owners(costs: Mapping[str, float], num_ranks: int) -> dict[str, int]:
    """Assign an owner to each name: the most expensive first, each to the least loaded rank (ties: the lowest)."""
    loads = [(0.0, rank) for rank in range(num_ranks)]  # a heap
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        load, owners[name] = loads[0]
        heapq.heapreplace(loads, (load + costs[name], owners[name]))
    return owners


def newton_schulz_cost(shape: tuple[int, ...], blocks: Blocks | None) -> float:
    """The number of multiplications of one Newton-Schulz iteration over the matrices of a parameter [rows, columns]."""
    cost = 0.0
    for rows in blocks or (slice(None),):
        num_rows = len(range(shape[0])[rows]) if isinstance(rows, slice) else rows.numel()
        short, long = sorted((num_rows, shape[1]))
        cost += short * short * (2 * long + short)
    return cost


def gather_holdings(local: Holding, group: dist.ProcessGroup | None) -> list[Holding]:
    """The holdings of all processes of the group, by rank."""
    holdings: list[Holding | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(holdings, replace(local, shapes=dict(local.shapes)), group=group)
    return [h for h in holdings if h is not None]
