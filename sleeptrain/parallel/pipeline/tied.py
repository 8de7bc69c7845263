"""Tied embeddings over a pipeline: the first stage embeds with the weight, the last one predicts with a copy of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid


class TiedEmbedding:
    """Keeps the two copies equal: both get the sum of their gradients, and the gradient norm counts it once.

    Create it before DeepSpeed wraps the model. The copies start equal, get equal gradients and are updated by AdamW,
    which is elementwise; so they stay equal up to rounding. A checkpoint holds the first stage's copy.
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
        # DeepSpeed leaves parameters with this mark out of the norm.
        weight.ds_pipe_replicated = mesh.pipeline.rank > 0  # type: ignore[attr-defined]

    def sum_gradients(self) -> None:
        """Sum the copies' gradients. Every rank calls it once a step, after all backwards and before ZeRO reduces."""
        if self._weight is not None:
            dist.all_reduce(self._weight.grad, group=self._group)
