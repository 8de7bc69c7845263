"""Tied embeddings over a pipeline: the first stage embeds with them, the last one predicts with a copy."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid


class TiedEmbedding:
    """Keeps the two copies one parameter: both get the sum of their gradients, and the norm counts it once.

    Make it before DeepSpeed takes the model over. Both copies begin equal, see equal gradients and are updated by the
    elementwise AdamW, so that they stay equal to rounding; a checkpoint holds the first stage's.
    """

    def __init__(self, model: Hybrid, mesh: Mesh) -> None:
        ends = mesh.pipeline.rank in (0, mesh.pipeline.size - 1)
        tied = model.config.tie_embeddings and mesh.pipeline.size > 1 and ends
        self._weight: torch.nn.Parameter | None = None
        if not tied:
            return
        assert model.embedding is not None
        weight = model.embedding.weight
        assert isinstance(weight, torch.nn.Parameter)
        self._weight, self._group = weight, parallel_state.get_embedding_group()
        # DeepSpeed leaves parameters so marked out of the norm.
        weight.ds_pipe_replicated = mesh.pipeline.rank > 0  # type: ignore[attr-defined]

    def sum_gradients(self) -> None:
        """Once a step, on every rank, when all backwards are done and before ZeRO sums over data ranks."""
        if self._weight is not None:
            dist.all_reduce(self._weight.grad, group=self._group)
