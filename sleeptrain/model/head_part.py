"""The head of one of several pipeline stages that share the vocabulary: a round's loss is joined from their parts.

A loss needs two numbers of each part and target: the log-sum-exp of the part's logits, and the target's logit where the
target is in the part. With the log-sum-exp of all logits each part computes the gradients of its own.
"""

from __future__ import annotations

import torch

from sleeptrain.model.hybrid import Hybrid, at_least_fp32, keeps_logits, rows_at_once
from sleeptrain.ops.vocabulary_part import part_gradients, part_statistics


class HeadPart:
    """The part of the head that a part of a model holds (`Hybrid.head_part`)."""

    def __init__(self, model: Hybrid) -> None:
        self._model = model

    def statistics(
        self, x_ND: torch.Tensor, targets_N: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(the statistics [2, N] in fp32 or wider, the logits some rows at a time or an empty list).

        x_ND: as `Hybrid.head_input` gives it. targets_N: int64 ids. The statistics are the log-sum-exp, and the
        target's logit or 0. keep: return the logits where `keeps_logits` allows it.
        """
        keep = keep and keeps_logits(len(targets_N), max(len(self._model.vocabulary), 1), x_ND.itemsize)
        return part_statistics(x_ND, self._copy(), self._local(targets_N), self._rows_at_once, keep)

    def objective(
        self, x_ND: torch.Tensor, targets_N: torch.Tensor, log_sums_N: torch.Tensor, kept: list[torch.Tensor]
    ) -> torch.Tensor:
        """A scalar without value whose gradients of x and the weight are the part's share of the summed loss's.

        log_sums_N: of the whole vocabulary. kept: the logits that `statistics` returned.
        """
        num_tokens, gradient = len(self._model.vocabulary), self._model.head_product.gradient
        weight = self._model.head_weight[:num_tokens]
        if gradient is not None:
            gradient = gradient[:num_tokens]
        rows, copy = self._rows_at_once, self._copy()
        return part_gradients(x_ND, weight, self._local(targets_N), log_sums_N, copy, gradient, rows, kept)

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The logits [N, rows of the matrix] in fp32 or wider; those of rows without a token are -inf."""
        product, matrix = self._model.head_product, self._model.head_weight
        logits = at_least_fp32(product.product(x_ND, matrix))
        logits[:, len(self._model.vocabulary) :] = float("-inf")
        return logits

    @property
    def _rows_at_once(self) -> int:
        # A tensor rank's part of a short vocabulary may be padding alone.
        return rows_at_once(max(len(self._model.vocabulary), 1))

    def _copy(self) -> torch.Tensor:
        """The rows of the matrix that stand for a token, in the dtype of products, without their graph."""
        product, weight = self._model.head_product, self._model.head_weight
        copy = weight.detach() if product.compute_dtype is None else product.copy_of(weight)
        return copy[: len(self._model.vocabulary)]

    def _local(self, targets_N: torch.Tensor) -> torch.Tensor:
        """The targets as rows of the part; those of other parts are below 0 or not below its number of rows."""
        return targets_N - self._model.vocabulary.start
