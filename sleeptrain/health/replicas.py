"""Whether the replicas of a run still hold the same weights, to the last bit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World, name_ranks
from sleeptrain.errors import DivergedError
from sleeptrain.model.hybrid import Hybrid

# Elements that are read at once: a checksum needs twelve bytes more for each of them.
CHUNK = 1 << 22
# An odd number near 2^64 divided by the golden ratio, as int64: its multiples are spread evenly.
SPREAD = -7046029254386353131


class _Held(NamedTuple):
    """What a process holds: place is that of its part of the model; digest: of the weights."""

    place: tuple[int, int]
    digest: bytes


def holds_copies(config: Config, world: World) -> bool:
    """Whether several processes hold the same weights; under ZeRO-3 each has a part of them that nobody else has."""
    return world.mesh.data.size > 1 and config.parallel.zero < 3


def compare_replicas(model: Hybrid, world: World) -> None:
    """Raises DivergedError where data-parallel ranks, which hold copies, differ in a weight. All processes call it.

    It names the ranks that hold what fewer of them hold (all, where no copy is the most common) and the first parameter
    that differs.
    """
    sums = checksums(model)
    digest = hashlib.blake2b(repr(sums).encode(), digest_size=16).digest()
    held = world.gather(_Held((world.mesh.pipeline.rank, world.mesh.tensor.rank), digest))
    copies = [[rank for rank, other in enumerate(held) if other.place == place] for place in {h.place for h in held}]
    if all(len({held[rank].digest for rank in ranks}) == 1 for ranks in copies):
        return
    names = [name for name, _ in model.named_parameters()]
    details = world.gather(dict(zip(names, sums, strict=True)))
    found = []
    for ranks in sorted(copies):
        differing = differing_ranks(ranks, [held[rank].digest for rank in ranks])
        if differing:
            first = next(name for name in details[ranks[0]] if len({details[rank][name] for rank in ranks}) > 1)
            found.append(f"{name_ranks(differing)} of {name_ranks(ranks)} (first in {first})")
    raise DivergedError(f"the weights of replicas differ: {'; '.join(found)}")


def differing_ranks(ranks: Sequence[int], digests: Sequence[bytes]) -> list[int]:
    """Those outside the largest group that agrees; all where two groups are as large; none where all agree."""
    (common, count), *others = Counter(digests).most_common()
    tied = bool(others) and others[0][1] == count
    return [rank for rank, digest in zip(ranks, digests, strict=True) if digest != common or tied]


@torch.no_grad()
def checksums(model: Hybrid) -> list[int]:
    """Of each parameter in turn."""
    found = [checksum(p) for p in model.parameters()]
    return torch.stack(found).tolist()


def checksum(values: torch.Tensor) -> torch.Tensor:
    """The sum of the values' bits as int32, each times an odd number of its own, modulo 2^64; an int64 scalar.

    A change of one 32-bit word always changes it (odd numbers have inverses), an exchange of two almost always. Integer
    sums do not depend on their order, so that it is the same on every device.
    """
    bits = values.detach().contiguous().view(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    odd = torch.arange(min(CHUNK, bits.numel()), device=bits.device).mul_(SPREAD).mul_(2).add_(1)
    for chunk in bits.split(CHUNK):
        total = total * SPREAD + (chunk.long() * odd[: chunk.numel()]).sum()
    return total
