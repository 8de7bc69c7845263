"""Whole matrices out of elementwise partitions, and back: what Muon needs where ZeRO has flattened its parameters.

Every process holds fragments of matrices. Each matrix has one owner, to which all its fragments travel, tensor parallel
shards included; there it is whole, is worked on once, and its fragments travel home. One all-to-all each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

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
    """What one process holds of a set of parameters: fragments of its tensor parallel shard of each.

    shard: its tensor parallel rank. shapes: of its shard of each parameter, whether it holds any of it or not.
    """

    shard: int
    shapes: Mapping[str, tuple[int, ...]]
    fragments: tuple[Fragment, ...]


class Shards(Protocol):
    """How tensor parallel shards form a whole parameter."""

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def take(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor: ...


class Unsharded:
    """Without tensor parallelism the only shard is the whole."""

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        (whole,) = shards
        return whole

    def take(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        return whole


class LayoutError(RuntimeError):
    """The fragments that processes hold do not make up whole parameters."""


# Called with the matrices that a process owns, by name; changes them in place.
Work = Callable[[dict[str, torch.Tensor]], None]


class Exchange:
    """The way of every fragment to its matrix's owner and back.

    holdings: of every process of the group, by rank. owners: the rank that owns each parameter. rank, group: this
    process's. Raises LayoutError unless the fragments of each shard cover it exactly; copies of one fragment in several
    processes count as one.
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
        # From one process to another: the fragments in the order of the owners' names, on both sides alike.
        self._given = [[f for n, o in owners.items() if o == to for f in senders[n].get(rank, ())] for to in ranks]
        self._taken = [[f for n in self.owned for f in senders[n].get(source, ())] for source in ranks]
        home = [_by_name(holding) for holding in holdings]
        self._returned = [[f for n in self.owned for f in home[to].get(n, ())] for to in ranks]
        self._received = [
            [f for n, o in owners.items() if o == source for f in home[rank].get(n, ())] for source in ranks
        ]

    def __call__(self, flat: torch.Tensor, work: Work) -> torch.Tensor:
        """The fragments of `flat` [numel] after `work` on the whole matrices; zero where no fragment lies."""
        outgoing = [flat[f.offset : f.offset + f.numel] for part in self._given for f in part]
        arrived = self._send(flat, outgoing, self._given, self._taken)
        local = self._assemble(flat, arrived)
        wholes = {n: self._shards.join(n, [local[n, s] for s in self._shards_of(n)]) for n in self.owned}
        work(wholes)
        done = {(n, s): self._shards.take(n, wholes[n], s).reshape(-1) for n, s in local}
        outgoing = [
            done[f.name, self._holdings[to].shard][f.start : f.start + f.numel]
            for to, part in enumerate(self._returned)
            for f in part
        ]
        arrived = self._send(flat, outgoing, self._returned, self._received)
        result = torch.zeros_like(flat)
        for f, piece in zip((f for part in self._received for f in part), arrived, strict=True):
            result[f.offset : f.offset + f.numel] = piece
        return result

    def _shards_of(self, name: str) -> list[int]:
        return sorted({h.shard for h in self._holdings if name in h.shapes})

    def _assemble(self, like: torch.Tensor, arrived: Iterator[torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        """The shards of the owned matrices, each of its own shape."""
        local: dict[tuple[str, int], torch.Tensor] = {}
        for holding in self._holdings:
            for name in self.owned:
                if (name, holding.shard) not in local:
                    local[name, holding.shard] = like.new_empty(holding.shapes[name])
        for source, part in enumerate(self._taken):
            for f in part:
                target = local[f.name, self._holdings[source].shard].view(-1)
                target[f.start : f.start + f.numel] = next(arrived)
        return local

    def _send(
        self,
        like: torch.Tensor,
        pieces: Sequence[torch.Tensor],
        outgoing: Sequence[Sequence[Fragment]],
        incoming: Sequence[Sequence[Fragment]],
    ) -> Iterator[torch.Tensor]:
        """One all-to-all; the pieces that arrive, in the order of `incoming`."""
        sent = torch.cat([like.new_empty(0), *pieces])
        sizes = [[sum(f.numel for f in part) for part in way] for way in (incoming, outgoing)]
        if len(self._holdings) == 1:
            buffer = sent
        else:
            buffer = like.new_empty(sum(sizes[0]))
            dist.all_to_all_single(buffer, sent, sizes[0], sizes[1], group=self._group)
        return iter(buffer.split([f.numel for part in incoming for f in part]))


def _by_name(holding: Holding) -> dict[str, list[Fragment]]:
    by_name: dict[str, list[Fragment]] = {}
    for f in holding.fragments:
        by_name.setdefault(f.name, []).append(f)
    return by_name


def _senders(name: str, owner: int, holdings: Sequence[Holding]) -> dict[int, list[Fragment]]:
    """The fragments of `name` that each rank sends; of copies the owner's own goes first, it need not travel."""
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
    at = 0
    for start, size in sorted(spans):
        if start != at:
            break
        at += size
    else:
        if at == numel:
            return
    raise LayoutError(
        f"the fragments {sorted(spans)} of {name} (tensor rank {shard}) do not cover its {numel} elements exactly once"
    )


def assign_owners(costs: Mapping[str, float], num_ranks: int) -> dict[str, int]:
    """An owner for each name: the most expensive first, each to the rank with the least to do (ties: the lowest)."""
    loads = [0.0] * num_ranks
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owners[name] = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[owners[name]] += costs[name]
    return owners


def newton_schulz_cost(shape: tuple[int, ...], blocks: Blocks | None) -> float:
    """Multiplications of one Newton-Schulz iteration over the matrices of a parameter [rows, columns]."""
    cost = 0.0
    for rows in blocks or (slice(None),):
        num_rows = len(range(shape[0])[rows]) if isinstance(rows, slice) else rows.numel()
        short, long = sorted((num_rows, shape[1]))
        cost += short * short * (2 * long + short)
    return cost


def gather_holdings(own: Holding, group: dist.ProcessGroup | None) -> list[Holding]:
    """The holdings of every process of the group, by rank."""
    everyone: list[Holding | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, replace(own, shapes=dict(own.shapes)), group=group)
    return [h for h in everyone if h is not None]
