"""Carried memory in a checkpoint: each process writes its rows and heads where they lie, and reads its own."""

from __future__ import annotations

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.fit import CARRIED
from sleeptrain.checkpoint.place import Place, Placed, Slice
from sleeptrain.checkpoint.read import Form, SavedTensors
from sleeptrain.data.batch import Part
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.state import FastWeights, empty_rows
from sleeptrain.parallel.tensor.sharding import ModelSharding


def own_carried(
    carried: FastWeights | None, mesh: Mesh, sharding: ModelSharding, device: torch.device
) -> dict[str, Placed]:
    """This process's share of the stage's memory: the rows of its replica, of its heads.

    All processes of the stage call it together; `device` is where they compute. The rows of a replica that carries no
    memory are empty. What several tensor ranks hold is cut evenly over them.
    """
    local = {} if carried is None else carried.to_state_dict()
    forms = _all_forms(local, mesh)
    rank, held = mesh.tensor.rank, dict[str, Placed]()
    for name, form in forms.items():
        tensor = local[name] if name in local else _empty(form, device)
        shape = sharding.state_shape(name, (form.shape[0] * mesh.data.size, *form.shape[1:]))
        rows = Part(mesh.data.rank, mesh.data.size).rows(shape[0])
        parts = [_rows(sharding.state_part(name, shape, other), rows) for other in range(sharding.size)]
        copies = [other for other, part in enumerate(parts) if part == parts[rank]]
        place = Place.of(parts[rank]).share(copies.index(rank), len(copies))
        if place.numel:
            held[CARRIED + name] = Placed(tensor.reshape(-1)[place.start : place.start + place.numel], place)
    return held


def load_carried(
    saved: SavedTensors, part: Part, layers: range, sharding: ModelSharding, shard: int, device: torch.device
) -> FastWeights | None:
    """Load the memory of this replica's rows for the layers and heads of this process; None if the run carries none."""
    names = [name.removeprefix(CARRIED) for name in saved.forms if name.startswith(CARRIED)]
    local = dict[str, torch.Tensor]()
    for name in (name for name in names if int(name.split(".")[0]) in layers):
        shape = saved.forms[CARRIED + name].shape
        own = _rows(sharding.state_part(name, shape, shard), part.rows(shape[0]))
        local[name] = saved.elements(CARRIED + name, Place.of(own)).view(own.sizes).to(device)
    return FastWeights.from_state_dict(local, len(sharding.config.layers)) if names else None


def _all_forms(local: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, Form]:
    """The forms of the memory of a replica that carries some; a process of another replica has tensors of the same."""
    own = {name: Form(tuple(t.shape), t.dtype) for name, t in local.items()}
    members: list[dict[str, Form]] = [own] * mesh.data.size
    if mesh.data.size > 1:
        dist.all_gather_object(members, own, group=mesh.data.group)
    return next((forms for forms in members if forms), {})


def _rows(part: Slice, rows: range) -> Slice:
    return part.box([(rows.start, rows.stop), *((0, size) for size in part.sizes[1:])])


def _empty(form: Form, device: torch.device) -> torch.Tensor:
    return empty_rows(torch.empty(form.shape, dtype=form.dtype, device=device), form.shape[0])
