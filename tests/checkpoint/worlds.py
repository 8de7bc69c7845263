"""Worlds for tests of checkpoints without training, and checkpoints of a few tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from sleeptrain.checkpoint.folder import step_folder
from sleeptrain.checkpoint.write import write
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World

DOCUMENTS = {"state.json": b'{"step": 1}', "config.yaml": b"run: {}\n"}


def alone() -> World:
    return World(Mesh.single(), torch.device("cpu"))


def all_or_raise() -> World:
    """The world of all gloo ranks."""
    groups = [dist.new_group(backend="gloo") for _ in range(2)]
    return World(Mesh.single(), torch.device("cpu"), dist.get_rank(), dist.get_world_size(), *groups)


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    """20 kB in all."""
    generator = torch.Generator().manual_seed(seed)
    named = {f"model/weight{i}": torch.randn(10, 100, generator=generator) for i in range(5)}
    return named | {"optim/adamw/weight0/step": torch.tensor(float(seed)), "rng/torch": torch.get_rng_state()}


def nothing() -> None:
    pass


def save(
    folder: Path, step: int, world: World | None = None, before_commit: Callable[[], None] = nothing
) -> dict[str, torch.Tensor]:
    """Writes the checkpoint of a step, and returns the tensors that this process owns."""
    world = world or alone()
    own = some_tensors(100 * step) if world.size == 1 else {f"model/of{world.rank}": torch.full((50, 100), float(step))}
    write(step_folder(folder, step), own, DOCUMENTS, world, before_commit)
    return own
