"""The part of a model that a process holds."""

from __future__ import annotations

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid


def build_model(config: ModelConfig, mesh: Mesh, layers: range | None = None, sequence: bool = False) -> Hybrid:
    """This process's tensor shard of the blocks `layers` (all if not given), without initial weights.

    A part that begins the stack embeds, one that ends it has norm and head. `sequence`: sequence parallelism inside it.
    The layout must have passed `check_layout`.
    """
    if mesh.tensor.size == 1:
        return Hybrid(config, layers)
    from sleeptrain.parallel.tensor.layers import TensorParallelHybrid  # one process does not wait for megatron-core

    return TensorParallelHybrid(config, mesh.tensor, layers, sequence)
