"""Check that the replicas of a run hold the same weights, to the last bit."""

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

# Elements of a chunk: a checksum takes twelve extra bytes per element.
CHUNK = 1 << 22
# An odd number near 2^64 divided by the golden ratio, as int64: its multiples are spread evenly.
SPREAD = -7046029254386353131


class _Weights(NamedTuple):
    """The weights of a process.

    place: (pipeline rank, tensor rank) of its part of the model. digest: of its weights.
    """

    place: tuple[int, int]
    digest: bytes


def holds_copies(config: Config, world: World) -> bool:
    """True if several processes hold the same weights. Under ZeRO-3 each holds a part that no other process has."""
    return world.mesh.data.size > 1 and config.parallel.zero < 3


def compare_replicas(model: Hybrid, world: World) -> None:
    """Raise DivergedError if data-parallel ranks, which hold copies of the weights, differ. All processes call it.

    The error names the ranks whose weights are in the minority (all ranks if there is no majority) and the first
    parameter that differs.
    """
    sums = checksums(model)
    digest = hashlib.blake2b(repr(sums).encode(), digest_size=16).digest()
    weights = world.gather(_Weights((world.mesh.pipeline.rank, world.mesh.tensor.rank), digest))
    copies = [
        [rank for rank, other in enumerate(weights) if other.place == place] for place in {w.place for w in weights}
    ]
    if all(len({weights[rank].digest for rank in ranks}) == 1 for ranks in copies):
        return
    names = [name for name, _ in model.named_parameters()]
    details = world.gather(dict(zip(names, sums, strict=True)))
    messages = []
    for ranks in sorted(copies):
        differing = differing_ranks(ranks, [weights[rank].digest for rank in ranks])
        if differing:
            first = next(name for name in details[ranks[0]] if len({details[rank][name] for rank in ranks}) > 1)
            messages.append(f"{name_ranks(differing)} of {name_ranks(ranks)} (first in {first})")
    raise DivergedError(f"the weights of replicas differ: {'; '.join(messages)}")


def differing_ranks(ranks: Sequence[int], digests: Sequence[bytes]) -> list[int]:
    """The ranks outside the largest group of equal digests. All if two groups are largest; none if all are equal."""
    (common, count), *others = Counter(digests).most_common()
    tied = bool(others) and others[0][1] == count
    return [rank for rank, digest in zip(ranks, digests, strict=True) if digest != common or tied]


@torch.no_grad()
def checksums(model: Hybrid) -> list[int]:
    """The checksum of each parameter, in order."""
    sums = [checksum(p) for p in model.parameters()]
    return torch.stack(sums).tolist()


def checksum(values: torch.Tensor) -> torch.Tensor:
    """The sum of the words of `values`, each times an odd number of its own, modulo 2^64; an int64 scalar.

    A word is an element of 16 bits, or 32 bits of a wider one.
    A change of one word always changes the sum, since odd numbers have inverses; an exchange of two words almost always
    does. An integer sum does not depend on the order of its terms, so every device gives the same result.
    """
    bits = values.detach().contiguous().view(-1).view(torch.int16 if values.itemsize == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    odd = torch.arange(min(CHUNK, bits.numel()), device=bits.device).mul_(SPREAD).mul_(2).add_(1)
    for chunk in bits.split(CHUNK):
        total = total * SPREAD + (chunk.long() * odd[: chunk.numel()]).sum()
    return total
