"""Tied embeddings over a pipeline: the first stage embeds with the weight, others predict with a copy of its rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart


class TiedEmbedding:
    """Keeps the copies equal: all copies of a row get the sum of its gradients, and the gradient norm counts it once.

    The last stage has a copy of all rows; where stages share the head, each has a copy of the rows of its part. Create
    it before DeepSpeed wraps the model. The copies start equal, get equal gradients and are updated by AdamW, which is
    elementwise; so they stay equal up to rounding. A checkpoint holds the first stage's copy.
    """

    def __init__(self, model: Hybrid, mesh: Mesh) -> None:
        self._pipeline, self._split = mesh.pipeline, model.head_part is not None
        self._weight: torch.nn.Parameter | None = None
        if not model.config.tie_embeddings or mesh.pipeline.size == 1 or model.embedding is None:
            return
        weight = model.embedding.weight
        assert isinstance(weight, torch.nn.Parameter)
        self._weight = weight
        # DeepSpeed leaves parameters with this mark out of the norm.
        weight.ds_pipe_replicated = mesh.pipeline.rank > 0  # type: ignore[attr-defined]

    def sum_gradients(self) -> None:
        """Sum the copies' gradients. Every rank calls it once a step, after all backwards and before ZeRO reduces."""
        if self._weight is None:
            return
        gradient = self._weight.grad
        assert gradient is not None, "every parameter has a gradient at the end of a step"
        if not self._split:
            dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
        elif self._pipeline.rank == 0:
            for part in range(1, self._pipeline.size):
                rows = VocabularyPart(part, self._pipeline.size).rows(len(gradient))
                self._sum_rows(gradient[rows.start : rows.stop], part)
        else:
            self._send(gradient, 0)
            self._receive(gradient, 0)

    def _sum_rows(self, gradient: torch.Tensor, stage: int) -> None:
        """Add the gradient of a stage's copy of these rows, and send it the sum."""
        other = torch.empty_like(gradient)
        self._receive(other, stage)
        gradient.add_(other)
        self._send(gradient, stage)

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        group = self._pipeline.group
        assert group is not None
        dist.send(tensor, dist.get_global_rank(group, stage), group)

    def _receive(self, tensor: torch.Tensor, stage: int) -> None:
        group = self._pipeline.group
        assert group is not None
        dist.recv(tensor, dist.get_global_rank(group, stage), group)
