"""The mesh: the axes along which a run is spread over processes, with megatron-core's process groups."""

from __future__ import annotations

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
    """

    tensor: Axis
    pipeline: Axis
    data: Axis

    @staticmethod
    def single() -> Mesh:
        """One process, with or without torch.distributed."""
        return Mesh(Axis(), Axis(), Axis())

    @staticmethod
    def build(tensor: int, pipeline: int, timeout: timedelta = TIMEOUT) -> Mesh:
        """The mesh of all processes of torch.distributed, which must be initialised (NCCL, or gloo without CUDA).

        The order is megatron-core's: neighbouring ranks are tensor ranks of one layer, since these communicate most;
        then come the replicas, then the pipeline stages. The sizes must have passed `check_layout`. Every process calls
        this once. timeout: for the operations of all axes.
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
        return Mesh(
            _axis(parallel_state.get_tensor_model_parallel_group()),
            _axis(parallel_state.get_pipeline_model_parallel_group()),
            _axis(parallel_state.get_data_parallel_group()),
        )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group)
