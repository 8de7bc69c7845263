"""Carried memory in a checkpoint: the shares of all processes joined to whole tensors, and cut again on loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.fit import CARRIED
from sleeptrain.checkpoint.read import Form, SavedTensors
from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.state import FastWeights, empty_rows
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.parallel.zero.matrix_exchange import assign_owners

Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Member:
    """A process of the stage: its data and tensor ranks, and the forms of the tensors that it carries, by name."""

    data: int
    tensor: int
    forms: dict[str, Form]


def own_carried(
    carried: FastWeights | None,
    mesh: Mesh,
    sharding: ModelSharding,
    stage: dist.ProcessGroup | None,
    device: torch.device,
) -> Named:
    """This process's share of the stage's memory as whole tensors on the CPU. One process owns all tensors of a layer.

    All processes of the stage call it together; `device` is where they compute. The rows of a replica that carries no
    memory are empty.
    """
    local = {} if carried is None else carried.to_state_dict()
    me = _Member(mesh.data.rank, mesh.tensor.rank, {n: Form(tuple(t.shape), t.dtype) for n, t in local.items()})
    members: list[_Member] = [me] * dist.get_world_size(stage)
    dist.all_gather_object(members, me, group=stage)
    forms = {name: form for member in members for name, form in member.forms.items()}
    owners = assign_owners(_sizes(forms), len(members))
    owned: Named = {}
    for layer, owner in sorted(owners.items()):
        shards: list[Named] = [{} for _ in members]
        for name in sorted(n for n in forms if _layer(n) == layer):
            shard = local[name] if name in local else _empty(forms[name], device)
            for tensors, tensor in zip(shards, _gather(shard.contiguous(), owner, stage), strict=True):
                tensors[name] = tensor
        if owner == dist.get_rank(stage):
            owned |= _join(shards, members, sharding)
    return {CARRIED + name: tensor.cpu() for name, tensor in owned.items()}


def load_carried(
    saved: SavedTensors, part: Part, layers: range, sharding: ModelSharding, shard: int, device: torch.device
) -> FastWeights | None:
    """Load the memory of this replica's rows for the layers and heads of this process; None if the run carries none.

    All processes call it together.
    """
    names = [name.removeprefix(CARRIED) for name in saved.forms if name.startswith(CARRIED)]
    local: Named = {}

    def take(name: str, whole: torch.Tensor) -> None:
        rows = part.rows(whole.shape[0])
        local[name] = whole[rows.start : rows.stop].to(device, copy=True)

    saved.read({CARRIED + name: partial(take, name) for name in names if int(_layer(name)) in layers})
    if not names:
        return None
    return sharding.take_state(FastWeights.from_state_dict(local, len(sharding.config.layers)), shard)


def _layer(name: str) -> str:
    return name.split(".")[0]


def _sizes(forms: dict[str, Form]) -> dict[str, float]:
    """Number of elements of each layer."""
    sizes: dict[str, float] = {}
    for name, form in forms.items():
        sizes[_layer(name)] = sizes.get(_layer(name), 0) + torch.Size(form.shape).numel()
    return sizes


def _empty(form: Form, device: torch.device) -> torch.Tensor:
    return empty_rows(torch.empty(form.shape, dtype=form.dtype, device=device), form.shape[0])


def _gather(local: torch.Tensor, owner: int, stage: dist.ProcessGroup | None) -> Sequence[torch.Tensor]:
    """The tensors of all members on the owner; as many tensors without elements on the other processes."""
    num_members = dist.get_world_size(stage)
    is_owner = owner == dist.get_rank(stage)
    tensors = [torch.empty_like(local) for _ in range(num_members)] if is_owner else None
    dist.gather(local, tensors, owner if stage is None else dist.get_global_rank(stage, owner), group=stage)
    return tensors or [local.new_empty(0)] * num_members


def _join(shards: Sequence[Named], members: Sequence[_Member], sharding: ModelSharding) -> Named:
    """Join one layer's tensors: first the heads of each replica's rows, then the rows, in the order of the replicas."""
    num_layers = len(sharding.config.layers)
    by_rank = {
        (m.data, m.tensor): FastWeights.from_state_dict(n, num_layers) for m, n in zip(members, shards, strict=True)
    }
    replicas = sorted({member.data for member in members})
    rows = [sharding.join_state([by_rank[data, t] for t in range(sharding.size)]).to_state_dict() for data in replicas]
    return {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
