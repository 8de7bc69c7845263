"""Which processes work together, told to DeepSpeed in its own words over megatron-core's groups."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Mesh

Group = dist.ProcessGroup | None


class MegatronUnit:
    """The model parallel unit ("mpu") that DeepSpeed asks, over a mesh of several processes.

    megatron-core's own module cannot be passed: it lacks the rank and size of the model parallel group. That group is
    all tensor and pipeline ranks of one replica, and the rank in it names checkpoint files, so it must be unique there.
    ZeRO-1 and 2 count a replicated gradient once by asking for the tensor rank instead.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._model = parallel_state.get_model_parallel_group()

    def get_model_parallel_group(self) -> Group:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)

    def get_data_parallel_group(self) -> Group:
        return self._mesh.data.group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data.size

    def get_tensor_model_parallel_group(self) -> Group:
        return self._mesh.tensor.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tensor.size

    def get_pipeline_model_parallel_group(self) -> Group:
        return self._mesh.pipeline.group

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.pipeline.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pipeline.size


def stage_group() -> Group:
    """All processes that hold this process's pipeline stage: tensor and data ranks together."""
    return parallel_state.get_tensor_and_data_parallel_group()
