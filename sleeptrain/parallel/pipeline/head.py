"""The losses of one micro-batch where the stages share the head: this rank's part of each round's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sleeptrain.model.head_part import HeadPart
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.parallel.pipeline.graph import HeadMessage, Kind
from sleeptrain.sleep.loop import ReadLogits
from sleeptrain.sleep.rounds import Round

RunBackward = Callable[[torch.Tensor], None]


class Form(NamedTuple):
    """The shape and dtype of a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Forward(NamedTuple):
    """What a round's forward keeps for its backward: its input [N, D], and logits some rows at a time, or none."""

    x_ND: torch.Tensor
    logits: list[torch.Tensor]


class HeadMicroBatch:
    """The forward and the backward of the rounds' losses in one part of the head; a round is named by its index.

    targets: of each round. divisor: divides each summed loss. trains: a backward follows each forward.
    read_logits: called on the last stage with all logits of a round that predicts, at once. The parts then send logits
    instead of statistics. Not where it trains.
    """

    def __init__(
        self,
        model: Hybrid,
        rounds: Sequence[Round],
        targets: Sequence[torch.Tensor],
        divisor: float,
        trains: bool,
        read_logits: ReadLogits | None,
    ) -> None:
        self._model, self._part, self._rounds, self._targets = model, HeadPart(model), rounds, targets
        self._divisor, self._trains, self._read_logits = divisor, trains, read_logits
        self._kept: dict[int, _Forward] = {}

    def form(self, message: HeadMessage) -> Form:
        """The form of a message. STATISTICS are the logits of the part where they are read."""
        model, num_targets = self._model, len(self._targets[message.round])
        weights = next(model.parameters()).dtype
        narrow, wide = model.compute_dtype or weights, torch.promote_types(weights, torch.float32)
        if message.kind in (Kind.HEAD_INPUT, Kind.HEAD_GRADIENT):
            return Form((num_targets, model.config.dim), narrow)
        if message.kind is Kind.LOG_SUMS:
            return Form((num_targets,), wide)
        if self._read_logits is None:
            return Form((2, num_targets), wide)
        assert model.head_part is not None
        rows = VocabularyPart(message.part, model.head_part.count).rows(model.config.vocab_size)
        return Form((num_targets, len(rows)), wide)

    @torch.no_grad()
    def forward(self, index: int, x_ND: torch.Tensor) -> torch.Tensor:
        """The statistics of this part in a round, or its logits where they are read."""
        if self._read_logits is not None:
            return self._part.logits(x_ND)
        statistics_2N, logits = self._part.statistics(x_ND, self._targets[index], keep=self._trains)
        if self._trains:
            self._kept[index] = _Forward(x_ND, logits)
        return statistics_2N

    @torch.no_grad()
    def join(self, index: int, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the summed loss of a round, the log-sum-exp [N] of its logits), from what all parts' forwards returned."""
        if self._read_logits is not None:
            logits, targets = self._model.join_logits(parts), self._targets[index]
            self._read_logits(self._rounds[index], 0, logits, targets)
            return F.cross_entropy(logits, targets, reduction="sum"), logits.logsumexp(1)
        log_sums, target_logits = self._model.join_statistics(parts)
        return (log_sums - target_logits).sum(), log_sums

    def backward(self, index: int, log_sums_N: torch.Tensor, run_backward: RunBackward) -> torch.Tensor:
        """Add the gradient of this part's weight, and return its gradient of the round's input, [N, D]."""
        kept = self._kept.pop(index)
        x_ND = kept.x_ND.detach().requires_grad_()
        objective = self._part.objective(x_ND, self._targets[index], log_sums_N, kept.logits)
        run_backward(objective / self._divisor)
        assert x_ND.grad is not None
        return x_ND.grad
