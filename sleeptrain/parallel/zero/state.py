"""Weights and optimizer state of a ZeRO engine as full tensors by name, so a checkpoint does not depend on the layout.

They are read from the partitions of `FlatOptimizer`. DeepSpeed's `safe_get_full_*` would gather every tensor on every
data rank, does not know tensor ranks, and does not work under ZeRO-0. Here only the owner of a tensor gathers it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.fit import OPTIMIZER, WEIGHTS
from sleeptrain.checkpoint.read import SavedTensors, Take
from sleeptrain.errors import DataError
from sleeptrain.optim.optimizers import STATE
from sleeptrain.parallel.zero.engine import ZeroEngine, check_wide
from sleeptrain.parallel.zero.flat_optimizer import Partition, step_key
from sleeptrain.parallel.zero.matrix_exchange import assign_owners
from sleeptrain.parallel.zero.partitions import local_shape, own_part, region


class _Item(NamedTuple):
    """A tensor of a checkpoint.

    path: its name in the checkpoint.
    name: its parameter.
    partition: the partition that holds fragments of it.
    key: its key in the optimizer's state; None for the weight itself.
    """

    path: str
    name: str
    partition: Partition
    key: str | None


def local_tensors(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """This process's share of the stage's weights and optimizer state: full tensors on the CPU, by checkpoint name.

    All processes of the stage call it together. Each tensor has one owner, and owners hold about equally many bytes;
    during the gathering a process holds at most one more full tensor. Tied embeddings come from the first stage.
    """
    items = [item for item in _items(engine) if not getattr(engine.parameters[item.name], "ds_pipe_replicated", False)]
    tensor, data = engine.mesh.tensor, engine.mesh.data
    sizes = {i.path: 1 if i.key == "step" else math.prod(engine.stage.whole[i.name]) for i in items}
    owners = assign_owners(sizes, tensor.size * data.size)
    owned: dict[str, torch.Tensor] = {}
    for item in items:
        owner = divmod(owners[item.path], tensor.size)
        if item.key == "step":
            full = _count(engine, item.partition.tensors[0], item.name) if owner == (data.rank, tensor.rank) else None
        else:
            full = _gather(engine, item, *owner)
        if full is not None:
            owned[item.path] = full.detach().to("cpu", copy=True)
    return owned


def load(engine: ZeroEngine, saved: SavedTensors) -> None:
    """Replace all weights and optimizer state by those of a checkpoint that fits (`check_resume`).

    Each process reads the weights of its stage, and the state of the parameters of which it holds fragments. Raises
    DataError if parameters that ZeRO steps together have different numbers of steps.
    """
    for state in engine.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # the checkpoint has no state for a parameter that has not been stepped
    steps: dict[str, float] = {}
    takes = _weight_takes(engine)
    for item in _items(engine):
        if item.key == "step":
            takes[item.path] = partial(_note_steps, steps, item.name)
        elif item.key is not None and any(f.name == item.name for f in item.partition.fragments):
            takes[item.path] = partial(_take_state, engine, item)
    _read(engine, saved, takes)
    for partition in engine.optimizer.partitions:
        if "step" in STATE[partition.kind]:
            _set_steps(engine, partition, steps)


def load_weights(engine: ZeroEngine, saved: SavedTensors) -> None:
    """Load the weights that the checkpoint has into a new engine; other weights keep their values."""
    _read(engine, saved, _weight_takes(engine))


def _items(engine: ZeroEngine) -> Iterator[_Item]:
    """All tensors of the stage for a checkpoint, in the same order in all its processes."""
    for partition in engine.optimizer.partitions:
        for name in partition.names:
            yield _Item(f"{WEIGHTS}{name}", name, partition, None)
            for key in sorted(STATE[partition.kind]):
                yield _Item(f"{OPTIMIZER}{partition.kind}/{name}/{key}", name, partition, key)


def _gather(engine: ZeroEngine, item: _Item, data_rank: int, tensor_rank: int) -> torch.Tensor | None:
    """The full tensor on its owner, None elsewhere: fragments are summed over data ranks, then shards are joined."""
    data, tensor = engine.mesh.data, engine.mesh.tensor
    tensors = _tensors(engine, item)
    shard = tensors[0].new_zeros(local_shape(engine.parameters[item.name]))
    for f in item.partition.fragments:
        if f.name == item.name:
            shard.view(-1)[f.start : f.start + f.numel] = region(tensors, f)
    if engine.zero > 0:
        # Summed as integers, which keeps all bits: as floats, -0.0 + 0.0 is 0.0.
        dist.reduce(shard.view(torch.int32), _global_rank(data.group, data_rank), group=data.group)
    if data.rank != data_rank:
        return None
    shards = [shard]
    if tensor.size > 1:
        shards = [torch.empty_like(shard) for _ in range(tensor.size if tensor.rank == tensor_rank else 0)]
        dist.gather(shard, shards or None, _global_rank(tensor.group, tensor_rank), group=tensor.group)
    return engine.stage.shards.join(item.name, shards) if shards else None


def _tensors(engine: ZeroEngine, item: _Item) -> list[torch.Tensor]:
    """The tensors of the item's partition: the weights, or the optimizer state under `item.key`."""
    tensors = item.partition.tensors
    return [(t if item.key is None else engine.optimizer.state[t][item.key]).detach() for t in tensors]


def _global_rank(group: Any, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _read(engine: ZeroEngine, saved: SavedTensors, takes: Mapping[str, Take]) -> None:
    saved.read({path: take for path, take in takes.items() if path in saved.forms})
    if engine.zero > 0:
        engine.deepspeed_engine.optimizer.refresh_fp32_params()
    check_wide(engine.parameters)


def _weight_takes(engine: ZeroEngine) -> dict[str, Take]:
    return {f"{WEIGHTS}{name}": partial(_take_weight, engine, name) for name in engine.parameters}


def _take_weight(engine: ZeroEngine, name: str, whole: torch.Tensor) -> None:
    """Load a weight without communication: if another process cannot read the checkpoint, this one does not wait."""
    p, local = engine.parameters[name], engine.stage.shards.take(name, whole, engine.stage.shard)
    if engine.zero == 3:
        part, start = own_part(p), engine.mesh.data.rank * own_part(p).numel()
        values = local.reshape(-1)[start : start + part.numel()]
        part[: values.numel()] = values
    if p.numel() == local.numel():  # under ZeRO-3 only if the parameter is gathered
        p.detach().copy_(local)


def _take_state(engine: ZeroEngine, item: _Item, whole: torch.Tensor) -> None:
    local = engine.stage.shards.take(item.name, whole, engine.stage.shard).reshape(-1)
    tensors = _tensors(engine, item)
    for f in item.partition.fragments:
        if f.name == item.name:
            region(tensors, f).copy_(local[f.start : f.start + f.numel])


def _note_steps(steps: dict[str, float], name: str, saved: torch.Tensor) -> None:
    steps[name] = float(saved)


def _set_steps(engine: ZeroEngine, partition: Partition, steps: Mapping[str, float]) -> None:
    """Set the step counts of a partition: parameters that are frozen in the same stages share one count."""
    for key in {_step_key(engine, name) for name in partition.names}:
        names = [name for name in partition.names if _step_key(engine, name) == key]
        counts = {steps.get(name, 0.0) for name in names}
        if len(counts) != 1:
            raise DataError(
                f"optimizer state does not fit: {', '.join(names)} have done {sorted(counts)} steps, but under ZeRO "
                "they are stepped together"
            )
        for tensor in partition.tensors:
            engine.optimizer.state[tensor][key].fill_(*counts)


def _step_key(engine: ZeroEngine, name: str) -> str:
    return step_key(engine.optimizer.roles[name].frozen)


def _count(engine: ZeroEngine, tensor: torch.Tensor, name: str) -> torch.Tensor:
    return engine.optimizer.state[tensor][_step_key(engine, name)]
