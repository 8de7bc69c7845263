"""The part of a model that a process holds."""

from __future__ import annotations

import torch.distributed as dist

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.errors import ConfigError, RefusedByAllError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.parallel.zero.matrix_exchange import assign_owners


def build_model(
    config: ModelConfig, mesh: Mesh, layers: range | None = None, sequence: bool = False, split_head: bool = False
) -> Hybrid:
    """Return this process's tensor shard of the blocks `layers` (default: all), with weights not yet initialised.

    A part with the first block has the embedding, a part with the last block the norm and the head. sequence: use
    sequence parallelism inside the part. split_head: each pipeline stage has a part of the head. The layout must have
    passed `check_layout`.
    """
    head_part = VocabularyPart(mesh.pipeline.rank, mesh.pipeline.size) if split_head else None
    if mesh.tensor.size == 1:
        return Hybrid(config, layers, head_part)
    from sleeptrain.parallel.tensor.layers import TensorParallelHybrid  # one process does not wait for megatron-core

    return TensorParallelHybrid(config, mesh.tensor, layers, sequence, head_part)


def check_start_memory(model: Hybrid, tensor: int, memory: int, is_main: bool) -> None:
    """Raise ConfigError if a rank cannot hold its tensor shard whole, as it does under ZeRO-3 until DeepSpeed cuts it.

    DeepSpeed's own way to build a cut model (zero.Init) cuts parameters inside each module's constructor. Here that is
    too early: weights are drawn by name in the whole module. model: the whole one, without weights. memory: bytes of
    the rank that has least. is_main: only the main process says it; the others raise RefusedByAllError.
    """
    needed = 4 * sum(p.numel() for p in model.parameters()) // tensor  # weights are fp32
    if needed > memory:
        raise (ConfigError if is_main else RefusedByAllError)(
            "parallel.zero=3 cuts weights over replicas after each rank has built its whole shard: "
            f"{needed / 2**30:.0f} GiB in fp32, and the device has {memory / 2**30:.0f} GiB. Raise parallel.tensor, or "
            "use parallel.zero=1 with parallel.pipeline"
        )


def draw_weights(model: Hybrid, seed: int, data: Axis) -> None:
    """Draw the initial weights of this process's part, with the values that one process would draw.

    The replicas share the work: each draws some parameters, about as many elements as the others, and sends them.
    """
    owners = assign_owners({name: float(p.numel()) for name, p in model.named_parameters()}, data.size)
    model.init_weights(seed, {name for name, owner in owners.items() if owner == data.rank})
    if data.size == 1:
        return
    assert data.group is not None
    for name, parameter in model.named_parameters():
        dist.broadcast(parameter.detach(), dist.get_global_rank(data.group, owners[name]), group=data.group)
