"""megatron-core's process groups behind the interface that DeepSpeed expects."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Mesh

Group = dist.ProcessGroup | None


class MegatronUnit:
    """The model parallel unit ("mpu") of DeepSpeed, over a mesh of several processes.

    megatron-core's module does not serve as one: it lacks the rank and size of the model parallel group. That group has
    all tensor and pipeline ranks of one replica. DeepSpeed names checkpoint files by the rank in it, so the rank must
    be unique. ZeRO-1 and 2 use the tensor rank to count a replicated gradient once. Its data parallel ranks are those
    over which the state is cut.
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
        return self._mesh.shard.group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.shard.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.shard.size

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
