"""Which process does what: the axes along which a run is spread, over megatron-core's process groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

# How long processes wait for each other, unless a run says otherwise.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Axis:
    """The processes that share everything but their place on one axis; this one is `rank` of `size`.

    group: None where there is one process and no torch.distributed.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """tensor: parts of each layer. pipeline: parts of the stack. data: replicas, each with its own rows."""

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

        Neighbouring ranks are tensor ranks of one layer, since these speak most; then come the replicas, then the
        stages (megatron-core's order). The sizes must have passed `check_layout`. Every process calls this once.
        timeout: of the operations of all axes.
        """
        # Here, not above: one process needs none of it, and importing it takes seconds.
        from megatron.core import parallel_state

        from sleeptrain.distributed import cpu_shim

        cpu_shim.install()
        # The gloo twins of the groups serve megatron-core's own checkpoints, which are not used.
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
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
