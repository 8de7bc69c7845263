"""The part of a model that a process holds."""

from __future__ import annotations

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid


def build_model(config: ModelConfig, mesh: Mesh, layers: range | None = None, sequence: bool = False) -> Hybrid:
    """Return this process's tensor shard of the blocks `layers` (default: all), with weights not yet initialised.

    A part with the first block has the embedding, a part with the last block the norm and the head. sequence: use
    sequence parallelism inside the part. The layout must have passed `check_layout`.
    """
    if mesh.tensor.size == 1:
        return Hybrid(config, layers)
    from sleeptrain.parallel.tensor.layers import TensorParallelHybrid  # one process does not wait for megatron-core

    return TensorParallelHybrid(config, mesh.tensor, layers, sequence)
