"""The sizes of the parameters that each process holds, and of their ZeRO partitions. Uses torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod

import torch

from sleeptrain.config.schema import Config
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.optim.freezing import num_frozen_stages, with_rates
from sleeptrain.optim.optimizers import KINDS, STATE, ParameterRole
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.pipeline.stage_split import splits_head
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.parallel.zero.working_weights import are_narrow
from sleeptrain.sleep.precision import narrow_parameters

# Bytes of an element: in fp32, as gradients and optimizer state are; in bf16, as ZeRO-1 keeps weights that are read so.
WIDE, NARROW = 4, 2
# DeepSpeed pads the flat tensor of a group to a multiple of this many elements for each replica (ZeRO-1 and 2).
ALIGNMENT = 2
# Elements that ZeRO-3 may keep gathered between a forward and its backward (its `max_live_parameters`).
MAX_GATHERED = 1_000_000_000


@dataclass(frozen=True)
class Held:
    """A parameter as a tensor rank of a pipeline stage holds it.

    name: of the parameter.
    numel: elements that the rank holds.
    shape: of the full parameter, not cut for tensor ranks or by a shared head.
    role: see `ParameterRole`.
    always_frozen: it is never trained. Without DeepSpeed it has no gradient and no optimizer state; with it, both.
    narrow: the model reads nothing wider than bf16 of it (`sleeptrain.sleep.precision.narrow_parameters`).
    """

    name: str
    numel: int
    shape: tuple[int, ...]
    role: ParameterRole
    always_frozen: bool = False
    narrow: bool = False


def held_parameters(config: Config, bounds: Sequence[int]) -> list[list[Held]]:
    """The parameters of each pipeline stage. A stage has the layers between two neighbours in `bounds`."""
    return ModelParameters(config).stages(config, bounds)


class ModelParameters:
    """The parameters of a model, from which those of the stages of any layout follow."""

    def __init__(self, config: Config) -> None:
        """config: its `parallel` is not read."""
        with torch.device("meta"):
            model = Hybrid(config.model)
        self._whole, self._roles = dict(model.named_parameters()), with_rates(parameter_roles(model), config.optim)
        self._narrow = narrow_parameters(config.train, model)
        self._blocks: dict[int, list[list[Held]]] = {}  # by the number of tensor ranks, of each block

    def stages(self, config: Config, bounds: Sequence[int]) -> list[list[Held]]:
        """As `held_parameters`. config: with the same settings, but for `parallel`."""
        num_stages, blocks, held = len(bounds) - 1, self._held_by_blocks(config), list[list[Held]]()
        shared = splits_head(config, num_stages)
        for stage, (start, stop) in enumerate(pairwise(bounds)):
            part = VocabularyPart(stage, num_stages) if shared else None
            before, after = self._around(config, start == 0, stop == bounds[-1], part)
            held.append([*before, *(h for block in blocks[start:stop] for h in block), *after])
        return held

    def _held_by_blocks(self, config: Config) -> list[list[Held]]:
        size = config.parallel.tensor
        if size not in self._blocks:
            sharding, found = ModelSharding(config.model, size), [list[Held]() for _ in config.model.layers]
            for name in self._whole:
                if name.startswith("blocks."):
                    found[int(name.split(".")[1])].append(self._held(config, name, sharding, name in self._narrow))
            self._blocks[size] = found
        return self._blocks[size]

    def _around(
        self, config: Config, begins: bool, ends: bool, part: VocabularyPart | None
    ) -> tuple[list[Held], list[Held]]:
        """What a stage holds before and after its blocks; part: of the head. A model of three blocks has the same."""
        small = replace(config.model, layers=config.model.layers[:1] * 3, mixer_only=[])
        with torch.device("meta"):
            stage = Hybrid(small, range(0 if begins else 1, 3 if ends else 2), part)
        names = [name for name, _ in stage.named_parameters()]
        sharding, narrow = ModelSharding(small, config.parallel.tensor, part), narrow_parameters(config.train, stage)
        held = [None if n.startswith("blocks.") else self._held(config, n, sharding, n in narrow) for n in names]
        first = held.index(None)
        return [h for h in held[:first] if h], [h for h in held[first:] if h]

    def _held(self, config: Config, name: str, sharding: ModelSharding, narrow: bool) -> Held:
        p, role = self._whole[name], self._roles[name]
        local = sharding.take(name, p.detach(), 0)
        always_frozen = len(role.frozen) == num_frozen_stages(config.optim)
        return Held(name, local.numel(), tuple(p.shape), role, always_frozen, narrow)


def count_parameters(config: Config) -> tuple[int, int]:
    """(elements of all parameters, elements of embeddings and head) of the model."""
    with torch.device("meta"):
        named = [(name, p.numel()) for name, p in Hybrid(config.model).named_parameters()]
    return sum(n for _, n in named), sum(n for name, n in named if name.startswith(("embedding.", "head.")))


@dataclass(frozen=True)
class TrainingState:
    """Bytes that a process holds between steps.

    weights: of the model; under ZeRO-3 with the gathered ones.
    master: ZeRO's copy of the partition that this process updates.
    gradients: at the end of a backward.
    optimizer: Muon's momentum, AdamW's two averages.
    """

    weights: int
    master: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.master + self.gradients + self.optimizer


def training_state(
    held: Sequence[Held], zero: int, mesh: tuple[int, int, int], shard: int | None = None
) -> TrainingState:
    """The state of the fullest replica. One process alone trains without DeepSpeed.

    held: the parameters of a process. zero: ZeRO stage. mesh: (tensor ranks, pipeline stages, replicas).
    shard: `parallel.shard_replicas`.
    """
    pipeline, replicas = mesh[1], shard or mesh[2]
    numel = sum(h.numel for h in held)
    if prod(mesh) == 1:
        trained = [h for h in held if not h.always_frozen]
        optimizer = sum(h.numel * _averages(h.role) for h in trained)
        return TrainingState(WIDE * numel, 0, WIDE * sum(h.numel for h in trained), WIDE * optimizer)
    if zero == 0:
        return TrainingState(WIDE * numel, 0, WIDE * numel, WIDE * sum(h.numel * _averages(h.role) for h in held))
    groups = list(role_groups(held, zero))
    if zero == 3:
        cut = [[-(-h.numel // replicas) for h in group] for group in groups]
        local = sum(map(sum, cut))
        optimizer = sum(sum(part) * _averages(group[0].role) for part, group in zip(cut, groups, strict=True))
        return TrainingState(WIDE * (local + min(numel, MAX_GATHERED)), WIDE * local, WIDE * local, WIDE * optimizer)
    parts = [partition_size(group, replicas) for group in groups]
    optimizer = sum(part * _averages(group[0].role) for part, group in zip(parts, groups, strict=True))
    gradients = sum(parts) * replicas if zero == 1 else numel
    if zero == 2 and pipeline == 1:  # the full gradient of each parameter that lies in its partition
        reached = [[sum(h.numel for h, _ in reach) for reach in overlaps(group, replicas)] for group in groups]
        gradients = max(map(sum, zip(*reached, strict=True)))
    weights = sum(weight_bytes(group, zero) * part * replicas for part, group in zip(parts, groups, strict=True))
    return TrainingState(weights, WIDE * sum(parts), WIDE * gradients, WIDE * optimizer)


def role_groups(held: Sequence[Held], zero: int) -> Iterator[list[Held]]:
    """The optimizer's groups: DeepSpeed puts the parameters of one kind, and of one dtype, into one flat tensor."""
    for kind, narrow in product(KINDS, (False, True)):
        if group := [h for h in held if h.role.kind == kind and (h.narrow and are_narrow(zero)) == narrow]:
            yield group


def weight_bytes(group: Sequence[Held], zero: int) -> int:
    """Bytes of an element of the weights of one of several processes. group: of the optimizer."""
    return NARROW if group[0].narrow and are_narrow(zero) else WIDE


def partition_size(group: Sequence[Held], replicas: int) -> int:
    """Elements of a group that each replica updates under ZeRO-1 and 2, padding included."""
    alignment = ALIGNMENT * replicas
    return -(-sum(h.numel for h in group) // alignment) * ALIGNMENT


def overlaps(group: Sequence[Held], replicas: int) -> list[list[tuple[Held, int]]]:
    """For each replica, the (parameter, elements) that lie in its partition under ZeRO-1 and 2."""
    size, parts, start = partition_size(group, replicas), [list[tuple[Held, int]]() for _ in range(replicas)], 0
    for h in group:
        for replica in range(start // size, (start + h.numel - 1) // size + 1):
            inside = min(start + h.numel, (replica + 1) * size) - max(start, replica * size)
            parts[replica].append((h, inside))
        start += h.numel
    return parts


def _averages(role: ParameterRole) -> int:
    """How many tensors of the parameter's size its optimizer keeps."""
    return len(STATE[role.kind] - {"step"})
