"""Weights and optimizer state of a ZeRO engine as whole tensors by name, so that a checkpoint depends on no layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sleeptrain.errors import DataError
from sleeptrain.parallel.flat_optimizer import Partition
from sleeptrain.parallel.partitions import assemble
from sleeptrain.parallel.zero import ZeroEngine, check_wide, load_deepspeed
from sleeptrain.train.optim import KINDS, STATE

OptimState = dict[str, dict[str, dict[str, torch.Tensor]]]


def state_dict(engine: ZeroEngine) -> dict[str, Any] | None:
    """{"model": {name: tensor}, "optim": as `Optimizers.state_dict()`} of the stage, whole tensors on the CPU.

    Every process of the stage calls it; the first of them is given the answer, the others None.
    """
    model: dict[str, torch.Tensor] = {}
    optim: OptimState = {kind: {} for kind in KINDS}
    first = dist.get_rank(engine.stage.group) == 0
    for partition in engine.optimizer.partitions:
        model |= _whole(engine, partition, partition.tensors, first)
        for key in sorted(STATE[partition.kind]):
            tensors = [engine.optimizer.state[t][key] for t in partition.tensors]
            if key == "step":
                named = {name: tensors[0].cpu().clone() for name in partition.names}
            else:
                named = _whole(engine, partition, tensors, first)
            for name, tensor in named.items():
                optim[partition.kind].setdefault(name, {})[key] = tensor
    return {"model": model, "optim": optim} if first else None


def load_state_dict(engine: ZeroEngine, state: Mapping[str, Any]) -> None:
    """Takes over a `state_dict` of any layout; every process gives the same whole tensors.

    A parameter that has not been stepped may have no optimizer state. Raises DataError, with nothing changed, when a
    name or shape does not fit.
    """
    for partition in engine.optimizer.partitions:
        for name in partition.names:
            _check(engine, partition.kind, name, state)
    _load_weights(engine, state["model"])
    for partition in engine.optimizer.partitions:
        for key in sorted(STATE[partition.kind]):
            _load_state(engine, partition, key, state["optim"][partition.kind])
    check_wide(engine.parameters)


def _whole(
    engine: ZeroEngine, partition: Partition, tensors: Sequence[torch.Tensor], keep: bool
) -> dict[str, torch.Tensor]:
    """What lies in a partition, whole, on the CPU of those that keep it; one parameter at a time is whole elsewhere."""
    whole: dict[str, torch.Tensor] = {}
    tensor_axis = engine.mesh.tensor
    for name, local in assemble(
        partition, tensors, engine.parameters, engine.mesh.data.group, replicated=engine.zero == 0
    ):
        shards = [local]
        if tensor_axis.size > 1:
            shards = [torch.empty_like(local) for _ in range(tensor_axis.size)]
            dist.all_gather(shards, local, group=tensor_axis.group)
        if keep:
            whole[name] = engine.stage.shards.join(name, shards).cpu()
    return whole


def _load_weights(engine: ZeroEngine, tensors: Mapping[str, torch.Tensor]) -> None:
    zero = load_deepspeed().zero
    group = engine.mesh.data.group
    first = 0 if group is None else dist.get_global_rank(group, 0)
    for name, p in engine.parameters.items():
        value = engine.stage.shards.take(name, tensors[name], engine.stage.shard)
        with torch.no_grad(), zero.GatheredParameters([p], modifier_rank=first, enabled=engine.zero == 3):
            p.copy_(value)
    if engine.zero > 0:
        engine.deepspeed_engine.optimizer.refresh_fp32_params()


def _load_state(
    engine: ZeroEngine, partition: Partition, key: str, named: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    targets = [engine.optimizer.state[t][key] for t in partition.tensors]
    if key == "step":
        for target in targets:
            target.fill_(_steps(partition, named))
        return
    flat = torch.zeros_like(torch.cat([t.reshape(-1) for t in targets]))
    for f in partition.fragments:
        if whole := named[f.name]:
            local = engine.stage.shards.take(f.name, whole[key], engine.stage.shard).reshape(-1)
            flat[f.offset : f.offset + f.numel] = local[f.start : f.start + f.numel].to(flat)
    for target, part in zip(targets, flat.split([t.numel() for t in targets]), strict=True):
        target.copy_(part.view_as(target))


def _steps(partition: Partition, named: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
    """The step count that the parameters of a partition share: ZeRO updates them together."""
    steps = {float(named[name].get("step", 0.0)) for name in partition.names}
    if len(steps) != 1:
        raise DataError(
            f"optimizer state does not fit: {', '.join(partition.names)} have done {sorted(steps)} steps, but under "
            "ZeRO they are stepped together"
        )
    return steps.pop()


def _check(engine: ZeroEngine, kind: str, name: str, state: Mapping[str, Any]) -> None:
    wanted = tuple(engine.stage.whole[name])
    found = {"weights": state["model"].get(name)}
    optim = state["optim"].get(kind, {}).get(name)
    if optim is None or set(optim) not in (set(), STATE[kind]):
        raise DataError(
            f"optimizer state does not fit: {name} is trained by {kind} in the model, but the checkpoint has not what "
            f"{kind} keeps ({', '.join(sorted(STATE[kind]))}); resume with the optim settings of the checkpoint"
        )
    found |= {key: tensor for key, tensor in optim.items() if key != "step"}
    for what, tensor in found.items():
        if tensor is None or tuple(tensor.shape) != wanted:
            shape = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise DataError(
                f"checkpoint does not fit: {what} of {name} is {shape} in the checkpoint, the model has {wanted}; "
                "resume with the model settings of the checkpoint"
            )
