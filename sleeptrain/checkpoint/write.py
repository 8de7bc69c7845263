"""Writes a checkpoint from all processes of a run: each writes a file of what it holds, and one commits the folder."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from sleeptrain.checkpoint.folder import Entries, commit
from sleeptrain.checkpoint.place import Tensors
from sleeptrain.checkpoint.tensor_file import write_tensors
from sleeptrain.distributed.world import World
from sleeptrain.errors import CheckpointError


def write(
    target: Path,
    tensors: Tensors,
    documents: Mapping[str, bytes],
    world: World,
    before_commit: Callable[[], None],
) -> None:
    """Writes the checkpoint `target`. All processes call it, each with the elements that it writes, on the CPU.

    documents: the contents of the other files, by name. Only those of the main process (rank 0) are written.
    before_commit: called by the main process when all tensors are written.
    The folder appears whole or not at all. If one process fails, all raise CheckpointError and no files remain.
    """

    def complete() -> None:
        if world.is_main:
            before_commit()
            commit(partial, target, written, documents)

    partial = target.with_name(f".{target.name}.partial")
    try:
        token = world.all_or_raise(lambda: secrets.token_hex(4), world.saving)[0]
        partial = target.with_name(f".{target.name}.partial-{token}")
        by_rank = world.all_or_raise(lambda: _write_tensors(partial, tensors, world.rank), world.saving)
        written: Entries = {name: entry for part in by_rank for name, entry in part.items()}
        world.all_or_raise(complete, world.saving)
    except Exception as error:
        raise CheckpointError(str(error)) from error
    finally:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(folder: Path, tensors: Tensors, rank: int) -> Entries:
    """Writes this process's file, if it has tensors. Returns its entry of the manifest."""
    if not tensors:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard-{rank + 1:05d}.safetensors"
    with open(path, "wb") as file:
        entry = write_tensors(file, tensors)
        file.flush()
        os.fsync(file.fileno())
    return {path.name: entry}
