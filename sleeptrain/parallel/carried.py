"""The memory of all rows, layers and heads in a checkpoint, from what each process carries, and back."""

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
    """What a process of the stage tells the others. forms: of what it carries, by name."""

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
    """This process's share of the stage's memory, whole tensors on the CPU; those of a layer have one owner.

    All processes of the stage, which work on `device`, call it. Rows of a replica that carries nothing are empty.
    """
    own = {} if carried is None else carried.to_state_dict()
    me = _Member(mesh.data.rank, mesh.tensor.rank, {n: Form(tuple(t.shape), t.dtype) for n, t in own.items()})
    members: list[_Member] = [me] * dist.get_world_size(stage)
    dist.all_gather_object(members, me, group=stage)
    forms = {name: form for member in members for name, form in member.forms.items()}
    owners = assign_owners(_sizes(forms), len(members))
    whole: Named = {}
    for layer, owner in sorted(owners.items()):
        found: list[Named] = [{} for _ in members]
        for name in sorted(n for n in forms if _layer(n) == layer):
            local = own[name] if name in own else _nothing(forms[name], device)
            for part, tensor in zip(found, _gathered(local.contiguous(), owner, stage), strict=True):
                part[name] = tensor
        if owner == dist.get_rank(stage):
            whole |= _joined(found, members, sharding)
    return {CARRIED + name: tensor.cpu() for name, tensor in whole.items()}


def load_carried(
    saved: SavedTensors, part: Part, layers: range, sharding: ModelSharding, shard: int, device: torch.device
) -> FastWeights | None:
    """The memory of a replica's rows in the layers and heads that a process holds; None where the run carries none.

    All processes call it.
    """
    names = [name.removeprefix(CARRIED) for name in saved.forms if name.startswith(CARRIED)]
    own: Named = {}

    def take(name: str, whole: torch.Tensor) -> None:
        rows = part.rows(whole.shape[0])
        own[name] = whole[rows.start : rows.stop].to(device, copy=True)

    saved.read({CARRIED + name: partial(take, name) for name in names if int(_layer(name)) in layers})
    if not names:
        return None
    return sharding.take_state(FastWeights.from_state_dict(own, len(sharding.config.layers)), shard)


def _layer(name: str) -> str:
    return name.split(".")[0]


def _sizes(forms: dict[str, Form]) -> dict[str, float]:
    """Elements by layer."""
    sizes: dict[str, float] = {}
    for name, form in forms.items():
        sizes[_layer(name)] = sizes.get(_layer(name), 0) + torch.Size(form.shape).numel()
    return sizes


def _nothing(form: Form, device: torch.device) -> torch.Tensor:
    return empty_rows(torch.empty(form.shape, dtype=form.dtype, device=device), form.shape[0])


def _gathered(local: torch.Tensor, owner: int, stage: dist.ProcessGroup | None) -> Sequence[torch.Tensor]:
    """The tensors of all members on the owner; elsewhere none, as empty ones."""
    num_members = dist.get_world_size(stage)
    mine = owner == dist.get_rank(stage)
    found = [torch.empty_like(local) for _ in range(num_members)] if mine else None
    dist.gather(local, found, owner if stage is None else dist.get_global_rank(stage, owner), group=stage)
    return found or [local.new_empty(0)] * num_members


def _joined(found: Sequence[Named], members: Sequence[_Member], sharding: ModelSharding) -> Named:
    """One layer's tensors: the heads of each replica's rows joined, then the rows one replica after the other."""
    num_layers = len(sharding.config.layers)
    by_place = {
        (m.data, m.tensor): FastWeights.from_state_dict(n, num_layers) for m, n in zip(members, found, strict=True)
    }
    replicas = sorted({member.data for member in members})
    rows = [sharding.join_state([by_place[data, t] for t in range(sharding.size)]).to_state_dict() for data in replicas]
    return {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
