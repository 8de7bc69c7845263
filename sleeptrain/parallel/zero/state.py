"""Weights and optimizer state of a ZeRO engine in a checkpoint, which does not depend on the layout.

Each process writes the fragments in its partitions of `FlatOptimizer` where they lie, each with its place in the full
tensor. Elements that several processes hold are cut evenly over these. Nothing is gathered for it, while DeepSpeed's
`safe_get_full_*` would gather every tensor on every data rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.fit import OPTIMIZER, WEIGHTS
from sleeptrain.checkpoint.place import Place, Placed, Slice
from sleeptrain.checkpoint.read import SavedTensors
from sleeptrain.distributed.mesh import Axis
from sleeptrain.errors import DataError, DivergedError
from sleeptrain.optim.optimizers import STATE
from sleeptrain.parallel.share_reads import Wanted, share_reads
from sleeptrain.parallel.zero.engine import ZeroEngine
from sleeptrain.parallel.zero.flat_optimizer import Partition, step_key
from sleeptrain.parallel.zero.matrix_exchange import Fragment
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


def local_tensors(engine: ZeroEngine) -> dict[str, Placed]:
    """This process's share of the stage's weights and optimizer state: views, by checkpoint name.

    All processes of the stage call it together. Together they hold each element once, and about equally many bytes.
    Tied embeddings come from the first stage. Raises DivergedError if processes differ in a weight that several hold.
    """
    _check_copies(engine)
    tensor, data = engine.mesh.tensor, engine.mesh.data
    held: dict[str, Placed] = {}
    for index, item in enumerate(_items(engine)):
        if getattr(engine.parameters[item.name], "ds_pipe_replicated", False):
            continue
        if item.key == "step":  # a single number, which all processes that hold some of the parameter hold
            writes = index % (tensor.size * data.size) == data.rank * tensor.size + tensor.rank
            if writes and _begins(engine, item.name):
                held[item.path] = Placed(_count(engine, item.partition.tensors[0], item.name).detach(), Place.whole(()))
            continue
        part, tensors = _part(engine, item.name), _tensors(engine, item)
        copies = _copies(engine, item.name)
        for f in _fragments(item):
            mine = fragment_place(part, f).share(*copies)
            if mine.numel:
                start = mine.start - f.start
                held[item.path] = Placed(region(tensors, f)[start : start + mine.numel], mine)
    return held


def fragment_place(part: Slice, fragment: Fragment) -> Place:
    """The place of a fragment of a shard, without padding. part: the elements of the full parameter in that shard."""
    numel = min(fragment.numel, max(part.numel - fragment.start, 0))
    return Place(part, fragment.start, numel)


def load(engine: ZeroEngine, saved: SavedTensors) -> None:
    """Replace all weights and optimizer state by those of a checkpoint that fits (`check_resume`).

    All processes call it together. Under ZeRO-1 to 3 each process reads its own fragments of the optimizer state, under
    ZeRO-1 and 2 also of the weights, which are gathered; what several data ranks need one of them reads. Raises
    DataError if parameters that ZeRO steps together have different numbers of steps.
    """
    for state in engine.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # the checkpoint has no state for a parameter that has not been stepped
    steps: dict[str, float] = {}
    items = [item for item in _items(engine) if item.path in saved.forms]
    counts = [Wanted(i.path, Place.whole(()), partial(_note_steps, steps, i.name)) for i in items if i.key == "step"]
    states = _wanted_fragments(engine, [item for item in items if item.key not in (None, "step")])
    _load(engine, saved, counts, states)
    for partition in engine.optimizer.partitions:
        if "step" in STATE[partition.kind]:
            _set_steps(engine, partition, steps)


def load_weights(engine: ZeroEngine, saved: SavedTensors) -> None:
    """Load the weights that the checkpoint has into a new engine; other weights keep their values.

    All processes call it together.
    """
    _load(engine, saved, [], [])


def _load(engine: ZeroEngine, saved: SavedTensors, shared: list[Wanted], own: list[Wanted]) -> None:
    """Read the weights and other elements. shared: what all data ranks want. own: what those of `Mesh.copies` want."""
    if engine.zero in (1, 2):  # of the fp32 masters, from which the weights follow
        weights = [item for item in _items(engine) if item.key is None and item.path in saved.forms]
        own = own + _wanted_fragments(engine, weights)
    else:
        shared = shared + _wanted_weights(engine, saved)
    if engine.zero == 0:  # all data ranks keep all of it
        shared, own = shared + own, []
    with ExitStack() as exchanges:  # after an error, too: no process waits for one that cannot read
        exchanges.callback(_complete, engine)
        exchanges.callback(share_reads, saved, shared, engine.mesh.data, _device(engine))
        share_reads(saved, own, engine.mesh.copies, _device(engine))


def _complete(engine: ZeroEngine) -> None:
    """Bring DeepSpeed's weights and fp32 partitions up to those of the two that were read."""
    if engine.zero == 3:
        engine.deepspeed_engine.optimizer.refresh_fp32_params()
    elif engine.zero:
        engine.deepspeed_engine.optimizer.update_lp_params()


def _items(engine: ZeroEngine) -> Iterator[_Item]:
    """All tensors of the stage for a checkpoint, in the same order in all its processes."""
    for partition in engine.optimizer.partitions:
        for name in partition.names:
            yield _Item(f"{WEIGHTS}{name}", name, partition, None)
            for key in sorted(STATE[partition.kind]):
                yield _Item(f"{OPTIMIZER}{partition.kind}/{name}/{key}", name, partition, key)


def _fragments(item: _Item) -> list[Fragment]:
    return [f for f in item.partition.fragments if f.name == item.name]


def _part(engine: ZeroEngine, name: str) -> Slice:
    """The part of the full parameter that this process's shard holds."""
    stage = engine.stage
    return stage.shards.part(name, stage.whole[name], stage.shard)


def _begins(engine: ZeroEngine, name: str) -> bool:
    """True if this stage holds the first element of the parameter. Several stages may share it by rows."""
    stage = engine.stage
    first = stage.shards.part(name, stage.whole[name], 0)
    return all(ranges[0][0] == 0 for ranges in first.ranges)


def _is_replicated(engine: ZeroEngine, name: str) -> bool:
    """True if all tensor ranks hold the whole parameter."""
    return engine.mesh.tensor.size > 1 and _part(engine, name) == Slice.cut(engine.stage.whole[name])


def _copies(engine: ZeroEngine, name: str) -> tuple[int, int]:
    """(number of this process's copy, how many there are) of its fragments of a parameter."""
    tensor, data = engine.mesh.tensor, engine.mesh.data
    same = data if engine.zero == 0 else engine.mesh.copies
    index, count = same.rank, same.size
    if _is_replicated(engine, name):
        index, count = index * tensor.size + tensor.rank, count * tensor.size
    return index, count


def _check_copies(engine: ZeroEngine) -> None:
    """Of elements that several processes hold, each writes a share, so they must hold the same."""
    tensor, copies = engine.mesh.tensor, engine.mesh.copies
    _compare(engine, [name for name in engine.parameters if _is_replicated(engine, name)], tensor, "tensor ranks")
    _compare(engine, list(engine.parameters) if copies.size > 1 else [], copies, "replicas")


def _compare(engine: ZeroEngine, names: Sequence[str], axis: Axis, holders: str) -> None:
    """Compare the sums of the bits of these weights. holders: what the processes of the axis are called."""
    if not names:
        return
    sums = dict(zip(names, torch.zeros(len(names), dtype=torch.int64, device=_device(engine)), strict=True))
    for partition in engine.optimizer.partitions:
        for f in partition.fragments:
            if f.name in sums:
                sums[f.name] += region(partition.tensors, f).detach().view(torch.int32).sum()
    own = torch.stack(list(sums.values()))
    everyone = [torch.empty_like(own) for _ in range(axis.size)]
    dist.all_gather(everyone, own, group=axis.group)
    for name, *found in zip(names, *(other.tolist() for other in everyone), strict=True):
        if len(set(found)) > 1:
            raise DivergedError(f"{holders} hold different values of {name}, of which each has a copy")


def _tensors(engine: ZeroEngine, item: _Item) -> list[torch.Tensor]:
    """The tensors of the item's partition: the weights, or the optimizer state under `item.key`."""
    tensors = item.partition.tensors
    return [(t if item.key is None else engine.optimizer.state[t][item.key]).detach() for t in tensors]


def _wanted_fragments(engine: ZeroEngine, items: Iterable[_Item]) -> list[Wanted]:
    """This process's fragments of the items."""
    return [
        Wanted(i.path, fragment_place(_part(engine, i.name), f), partial(_fill, region(_tensors(engine, i), f)))
        for i in items
        for f in _fragments(i)
    ]


def _wanted_weights(engine: ZeroEngine, saved: SavedTensors) -> list[Wanted]:
    return [
        Wanted(WEIGHTS + name, Place.of(_part(engine, name)), partial(_take_weight, engine, name))
        for name in engine.parameters
        if WEIGHTS + name in saved.forms
    ]


def _take_weight(engine: ZeroEngine, name: str, values: torch.Tensor) -> None:
    """Set a weight to the values of this process's shard, which may end in padding that the values lack."""
    p = engine.parameters[name]
    local = torch.zeros(local_shape(p), dtype=p.dtype, device=values.device)
    _fill(local.view(-1), values)
    if engine.zero == 3:
        part, start = own_part(p), engine.mesh.data.rank * own_part(p).numel()
        _fill(part, local.view(-1)[start : start + part.numel()])
    if p.numel() == local.numel():  # under ZeRO-3 only if the parameter is gathered
        p.detach().copy_(local)


def _fill(target: torch.Tensor, values: torch.Tensor) -> None:
    target[: values.numel()].copy_(values)


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


def _device(engine: ZeroEngine) -> torch.device:
    return engine.optimizer.partitions[0].tensors[0].device
