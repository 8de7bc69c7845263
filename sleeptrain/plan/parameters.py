"""The parameters that each process holds, and how ZeRO cuts them over replicas: sizes alone, on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from sleeptrain.config.schema import Config
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim.freezing import num_frozen_stages, with_rates
from sleeptrain.optim.optimizers import KINDS, STATE, ParameterRole
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.tensor.sharding import ModelSharding

WIDE = 4  # bytes of an element: weights, gradients and optimizer state are fp32 (`sleeptrain.parallel.zero.engine`)
# What DeepSpeed rounds the flat tensor of a group up to, in elements for each replica (ZeRO-1 and 2).
ALIGNMENT = 2
# Parameters that ZeRO-3 leaves gathered between a forward and its backward, in elements (its `max_live_parameters`).
MAX_GATHERED = 1_000_000_000


@dataclass(frozen=True)
class Held:
    """A parameter as a tensor rank of a stage holds it. whole: the elements of the parameter uncut. always_frozen: it
    is never trained, and one process alone makes no gradient and no optimizer state for it; DeepSpeed lays out both."""

    name: str
    numel: int
    whole: tuple[int, ...]
    role: ParameterRole
    always_frozen: bool = False


def held_parameters(config: Config, bounds: Sequence[int]) -> list[list[Held]]:
    """Of each pipeline stage; the stages are the layers between two neighbours in `bounds`."""
    sharding, size = ModelSharding(config.model, config.parallel.tensor), config.parallel.tensor
    with torch.device("meta"):
        whole = Hybrid(config.model)
        parts = [Hybrid(config.model, range(*ends)) for ends in pairwise(bounds)]
    roles = with_rates(parameter_roles(whole), config.optim)

    def held(name: str, p: torch.Tensor) -> Held:
        own = p if size == 1 else sharding.take(name, p.detach(), 0)
        always_frozen = len(roles[name].frozen) == num_frozen_stages(config.optim)
        return Held(name, own.numel(), tuple(p.shape), roles[name], always_frozen)

    return [[held(name, p) for name, p in part.named_parameters()] for part in parts]


def count_parameters(config: Config) -> tuple[int, int]:
    """(all, those of embeddings and head) of the model."""
    with torch.device("meta"):
        named = [(name, p.numel()) for name, p in Hybrid(config.model).named_parameters()]
    return sum(n for _, n in named), sum(n for name, n in named if name.startswith(("embedding.", "head.")))


@dataclass(frozen=True)
class TrainingState:
    """Bytes that a process holds from step to step, gradients at the end of a backward included.

    weights: as the model computes with them; under ZeRO-3 with those gathered. master: ZeRO's own copy of the part that
    this process updates. optimizer: Muon's momentum, AdamW's two averages.
    """

    weights: int
    master: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.master + self.gradients + self.optimizer


def training_state(held: Sequence[Held], zero: int, mesh: tuple[int, int, int]) -> TrainingState:
    """Of the fullest replica. mesh: tensor ranks, stages, replicas; one process alone trains without DeepSpeed."""
    _, pipeline, replicas = mesh
    numel = sum(h.numel for h in held)
    if prod(mesh) == 1:
        trained = [h for h in held if not h.always_frozen]
        optimizer = sum(h.numel * _averages(h.role) for h in trained)
        return TrainingState(WIDE * numel, 0, WIDE * sum(h.numel for h in trained), WIDE * optimizer)
    if zero == 0:
        return TrainingState(WIDE * numel, 0, WIDE * numel, WIDE * sum(h.numel * _averages(h.role) for h in held))
    groups = list(role_groups(held))
    if zero == 3:
        cut = [[-(-h.numel // replicas) for h in group] for group in groups]
        own = sum(map(sum, cut))
        optimizer = sum(sum(part) * _averages(group[0].role) for part, group in zip(cut, groups, strict=True))
        return TrainingState(WIDE * (own + min(numel, MAX_GATHERED)), WIDE * own, WIDE * own, WIDE * optimizer)
    parts = [partition_size(group, replicas) for group in groups]
    optimizer = sum(part * _averages(group[0].role) for part, group in zip(parts, groups, strict=True))
    gradients = numel
    if zero == 2 and pipeline == 1:  # of each parameter of which it updates a part, whole
        reached = [[sum(h.numel for h, _ in reach) for reach in overlaps(group, replicas)] for group in groups]
        gradients = max(map(sum, zip(*reached, strict=True)))
    return TrainingState(WIDE * sum(parts) * replicas, WIDE * sum(parts), WIDE * gradients, WIDE * optimizer)


def role_groups(held: Sequence[Held]) -> Iterator[list[Held]]:
    """The optimizer's groups: parameters of one kind lie in one flat tensor."""
    for kind in KINDS:
        if group := [h for h in held if h.role.kind == kind]:
            yield group


def partition_size(group: Sequence[Held], replicas: int) -> int:
    """Elements of a group that each replica updates under ZeRO-1 and 2, padding included."""
    alignment = ALIGNMENT * replicas
    return -(-sum(h.numel for h in group) // alignment) * ALIGNMENT


def overlaps(group: Sequence[Held], replicas: int) -> list[list[tuple[Held, int]]]:
    """For each replica the parameters that lie in its partition (ZeRO-1 and 2), with the elements that do."""
    size, found, at = partition_size(group, replicas), [list[tuple[Held, int]]() for _ in range(replicas)], 0
    for h in group:
        for replica in range(at // size, (at + h.numel - 1) // size + 1):
            inside = min(at + h.numel, (replica + 1) * size) - max(at, replica * size)
            found[replica].append((h, inside))
        at += h.numel
    return found


def _averages(role: ParameterRole) -> int:
    """The tensors of a parameter's size that its optimizer keeps."""
    return len(STATE[role.kind] - {"step"})
