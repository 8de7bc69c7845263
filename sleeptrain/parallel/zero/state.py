"""Weights and optimizer state of a ZeRO engine as whole tensors by name, so that a checkpoint depends on no layout.

They are read where `FlatOptimizer` has been told that they lie. DeepSpeed's `safe_get_full_*` would give every data
rank every tensor, know nothing of tensor ranks, and not serve ZeRO-0; here a tensor comes together on its owner alone.
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
    """A tensor of a checkpoint. key: of the optimizer's state; None for the weight itself."""

    path: str
    name: str
    partition: Partition
    key: str | None


def local_tensors(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """This process's share of the stage's weights and optimizer state: whole tensors on the CPU, by checkpoint name.

    All processes of the stage call it. Each tensor has one owner; they hold about equally many bytes, and besides at
    most one whole tensor at a time. Of tied embeddings the first stage's are taken.
    """
    items = [item for item in _items(engine) if not getattr(engine.parameters[item.name], "ds_pipe_replicated", False)]
    tensor, data = engine.mesh.tensor, engine.mesh.data
    sizes = {i.path: 1 if i.key == "step" else math.prod(engine.stage.whole[i.name]) for i in items}
    owners = assign_owners(sizes, tensor.size * data.size)
    own: dict[str, torch.Tensor] = {}
    for item in items:
        owner = divmod(owners[item.path], tensor.size)
        if item.key == "step":
            whole = _count(engine, item.partition.tensors[0], item.name) if owner == (data.rank, tensor.rank) else None
        else:
            whole = _gathered(engine, item, *owner)
        if whole is not None:
            own[item.path] = whole.detach().to("cpu", copy=True)
    return own


def load(engine: ZeroEngine, saved: SavedTensors) -> None:
    """Takes the weights and the optimizer state of a checkpoint that fits (`check_resume`), which replace all there is.

    Each process reads the weights of its stage and of the state what it keeps a part of. Raises DataError where
    parameters that ZeRO steps together have done different numbers of steps.
    """
    for state in engine.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # what a parameter keeps that has not been stepped
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
    """Takes the weights that the checkpoint has into a fresh engine; the others stay."""
    _read(engine, saved, _weight_takes(engine))


def _items(engine: ZeroEngine) -> Iterator[_Item]:
    """In the same order in all processes of the stage."""
    for partition in engine.optimizer.partitions:
        for name in partition.names:
            yield _Item(f"{WEIGHTS}{name}", name, partition, None)
            for key in sorted(STATE[partition.kind]):
                yield _Item(f"{OPTIMIZER}{partition.kind}/{name}/{key}", name, partition, key)


def _gathered(engine: ZeroEngine, item: _Item, data_rank: int, tensor_rank: int) -> torch.Tensor | None:
    """The whole tensor on its owner, None elsewhere: summed over the data ranks' fragments, then shards joined."""
    data, tensor = engine.mesh.data, engine.mesh.tensor
    tensors = _tensors(engine, item)
    full = tensors[0].new_zeros(local_shape(engine.parameters[item.name]))
    for f in item.partition.fragments:
        if f.name == item.name:
            full.view(-1)[f.start : f.start + f.numel] = region(tensors, f)
    if engine.zero > 0:
        # As integers: bits added to zero bits stay what they are, which -0.0 does not.
        dist.reduce(full.view(torch.int32), _global_rank(data.group, data_rank), group=data.group)
    if data.rank != data_rank:
        return None
    shards = [full]
    if tensor.size > 1:
        shards = [torch.empty_like(full) for _ in range(tensor.size if tensor.rank == tensor_rank else 0)]
        dist.gather(full, shards or None, _global_rank(tensor.group, tensor_rank), group=tensor.group)
    return engine.stage.shards.join(item.name, shards) if shards else None


def _tensors(engine: ZeroEngine, item: _Item) -> list[torch.Tensor]:
    """What lies in the item's partition: the weights, or a state of them."""
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
    """Without the other processes, so that one that cannot read does not keep them waiting."""
    p, local = engine.parameters[name], engine.stage.shards.take(name, whole, engine.stage.shard)
    if engine.zero == 3:
        part, start = own_part(p), engine.mesh.data.rank * own_part(p).numel()
        values = local.reshape(-1)[start : start + part.numel()]
        part[: values.numel()] = values
    if p.numel() == local.numel():  # under ZeRO-3 one that is gathered at this moment
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
    """A partition's step counts, which parameters share that are frozen in the same stages."""
    for key in {_step_key(engine, name) for name in partition.names}:
        names = [name for name in partition.names if _step_key(engine, name) == key]
        found = {steps.get(name, 0.0) for name in names}
        if len(found) != 1:
            raise DataError(
                f"optimizer state does not fit: {', '.join(names)} have done {sorted(found)} steps, but under ZeRO "
                "they are stepped together"
            )
        for tensor in partition.tensors:
            engine.optimizer.state[tensor][key].fill_(*found)


def _step_key(engine: ZeroEngine, name: str) -> str:
    return step_key(engine.optimizer.roles[name].frozen)


def _count(engine: ZeroEngine, tensor: torch.Tensor, name: str) -> torch.Tensor:
    return engine.optimizer.state[tensor][_step_key(engine, name)]
