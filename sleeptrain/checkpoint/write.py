"""Writes a checkpoint from all processes of a run, with torch.distributed.checkpoint, in safetensors files."""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from sleeptrain.checkpoint.folder import Entries, commit, entries
from sleeptrain.distributed.world import World
from sleeptrain.errors import CheckpointError

# Files are small, since each is assembled in memory before it is written. A larger tensor gets a file of its own.
FILE_BYTES = 256 * 2**20

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def write(
    target: Path,
    tensors: Mapping[str, torch.Tensor],
    documents: Mapping[str, bytes],
    world: World,
    before_commit: Callable[[], None],
) -> None:
    """Writes the checkpoint `target`. All processes call it, each with the tensors that it owns, on the CPU.

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
        _write_tensors(partial, tensors, world)
        pattern = f"shard-{world.rank + 1:05d}-*"
        by_rank = world.all_or_raise(lambda: entries(sorted(partial.glob(pattern))), world.saving)
        written: Entries = {name: entry for part in by_rank for name, entry in part.items()}
        world.all_or_raise(complete, world.saving)
    except Exception as error:
        raise CheckpointError(str(error)) from error
    finally:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], world: World) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(
            dict(tensors),
            storage_writer=_Writer(str(folder), save_distributed=True),
            planner=planner,
            process_group=world.saving,
            no_dist=world.saving is None,
        )
    except CheckpointException as error:
        raise CheckpointError(first_failure(error)) from error


def first_failure(error: CheckpointException) -> str:
    """The first failure in one line, since DCP's own text holds the stack of every process."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"process {rank}: {cause}"


class _Writer(HuggingFaceStorageWriter):
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans = super().prepare_global_plan(plans)
        return [replace(p, storage_data={**p.storage_data, "fqn_to_index_mapping": _files(p.items)}) for p in plans]


def _files(items: Sequence[WriteItem]) -> dict[str, int]:
    """The file number, from 1, of each tensor of a process, by the tensor's name."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for item in items:
        assert item.tensor_data is not None  # only tensors are saved
        size = item.tensor_data.size.numel() * item.tensor_data.properties.dtype.itemsize
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[item.index.fqn], filled = number, filled + size
    return numbers
