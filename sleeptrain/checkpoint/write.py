"""Writes a checkpoint from all processes of a run: each writes a file of what it holds, and one commits the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sleeptrain.checkpoint.commit import commit, discard, new_file, place_of, prepare
from sleeptrain.checkpoint.folder import Entries
from sleeptrain.checkpoint.place import Tensors
from sleeptrain.checkpoint.tensor_file import write_tensors
from sleeptrain.distributed.world import World
from sleeptrain.errors import CheckpointError
from sleeptrain.remote import Location


def write(
    target: Location,
    tensors: Tensors,
    documents: Mapping[str, bytes],
    world: World,
    before_commit: Callable[[], None],
    pointer: Path | None = None,
) -> None:
    """Writes the checkpoint `target`. All processes call it, each with the elements that it writes, on the CPU.

    documents: the contents of the other files, by name. Only those of the main process (rank 0) are written.
    before_commit: called by the main process when all tensors are written.
    pointer: the folder of the pointer `latest`; None: it is beside the checkpoint.
    It appears whole or not at all. If one process fails, all raise CheckpointError and no files remain.
    """

    def complete() -> None:
        if world.is_main:
            before_commit()
            commit(place, target, written, documents, pointer)

    place = place_of(target, "new")
    try:
        token = world.all_or_raise(lambda: prepare(target) if world.is_main else "", world.saving)[0]
        place = place_of(target, token)
        by_rank = world.all_or_raise(lambda: _write_tensors(place, tensors, world.rank), world.saving)
        written: Entries = {name: entry for part in by_rank for name, entry in part.items()}
        world.all_or_raise(complete, world.saving)
    except Exception as error:
        raise CheckpointError(str(error)) from error
    finally:
        if world.is_main:
            discard(place)


def _write_tensors(place: Location, tensors: Tensors, rank: int) -> Entries:
    """Writes this process's file, if it has tensors. Returns its entry of the manifest."""
    if not tensors:
        return {}
    path = place / f"shard-{rank + 1:05d}.safetensors"
    with new_file(path) as file:
        entry = write_tensors(file, tensors)
    return {path.name: entry}
