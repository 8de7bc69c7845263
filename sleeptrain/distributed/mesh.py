"""The mesh: the axes along which a run is spread over processes, with megatron-core's process groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from sleeptrain.distributed.nccl import communicator_settings

# How long processes wait for each other by default.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Axis:
    """The processes that differ from this one only in their position on one axis.

    size: the number of these processes, this one included.
    rank: this process's position, from 0.
    group: the process group; None for one process without torch.distributed.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def name(self) -> str:
        """The name by which torch's functional collectives find the group."""
        assert self.group is not None, "one process has no group"
        return self.group.group_name


@dataclass(frozen=True)
class Mesh:
    """The axes of a run.

    tensor: processes that hold parts of each layer.
    pipeline: processes that hold parts of the stack of blocks.
    data: replicas, each with its own rows.
    shard: the neighbouring replicas over which ZeRO cuts its state: all, or `parallel.shard_replicas`.
    copies: the replicas that hold the same part of that state.
    state: the tensor ranks of the replicas of `shard`: together they hold the state of a pipeline stage. None for one
        process without torch.distributed.
    """

    tensor: Axis
    pipeline: Axis
    data: Axis
    shard: Axis = Axis()
    copies: Axis = Axis()
    state: dist.ProcessGroup | None = None

    @staticmethod
    def single() -> Mesh:
        """One process, with or without torch.distributed."""
        return Mesh(Axis(), Axis(), Axis())

    @staticmethod
    def build(tensor: int, pipeline: int, timeout: timedelta = TIMEOUT, shard_replicas: int | None = None) -> Mesh:
        """The mesh of all processes of torch.distributed, which must be initialised (NCCL, or gloo without CUDA).

        The order is megatron-core's: neighbouring ranks are tensor ranks of one layer, since these communicate most;
        then come the replicas, then the pipeline stages. The sizes must have passed `check_layout`. Every process calls
        this once. timeout: for the operations of all axes. shard_replicas: the size of `shard`; None: all replicas.
        """
        # Imported here: one process does not need it, and the import takes seconds.
        from megatron.core import parallel_state

        from sleeptrain.distributed import cpu_shim

        cpu_shim.install()
        # megatron-core needs gloo copies of the groups only for its own checkpoints, which are not used.
        with communicator_settings() if dist.get_backend() == "nccl" else nullcontext() as settings:
            parallel_state.initialize_model_parallel(
                tensor,
                pipeline,
                nccl_communicator_config_path=settings,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=timeout / timedelta(minutes=1),
            )
        tensors = _axis(parallel_state.get_tensor_model_parallel_group())
        stages = _axis(parallel_state.get_pipeline_model_parallel_group())
        data = _axis(parallel_state.get_data_parallel_group())
        size = shard_replicas or data.size
        if size == data.size:
            return Mesh(tensors, stages, data, data, Axis(), parallel_state.get_tensor_and_data_parallel_group())
        same = dist.get_rank() - tensor * data.rank  # the rank in the first replica that holds the same weights
        first = data.rank - data.rank % size  # replica of the group
        shard = [same + tensor * replica for replica in range(first, first + size)]
        copies = [same + tensor * replica for replica in range(data.rank % size, data.size, size)]
        corner = same - tensors.rank + tensor * first
        groups = [_new_group(ranks, timeout) for ranks in (shard, copies, range(corner, corner + tensor * size))]
        return Mesh(tensors, stages, data, _axis(groups[0]), _axis(groups[1]), groups[2])


def _new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """A group of these ranks, which alone take part in making it."""
    return dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group)
