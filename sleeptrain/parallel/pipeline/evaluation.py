"""Held-out evaluation through a pipeline: it runs only the forwards of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sleeptrain.parallel.pipeline.graph import Kind
from sleeptrain.parallel.pipeline.micro_batch import Part, RoundOutputs, StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import Action, Backward, HeadBackward, Receive, Schedule, Send


class EvaluationMicroBatch(StageMicroBatch):
    """A micro-batch that runs only forwards.

    losses: on the last stage, the summed loss of each window that predicts (a scalar), by window.
    """

    trains = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.losses: dict[int, torch.Tensor] = {}

    def forward(self, index: int, entry: Sequence[Part], trained: bool) -> RoundOutputs:
        return super().forward(index, entry, trained=False)

    def add_loss(self, index: int, loss: torch.Tensor) -> None:
        super().add_loss(index, loss)
        window = self.rounds[index].window
        self.losses[window] = self.losses.get(window, torch.zeros_like(loss)) + loss


def forwards_of(schedule: Schedule) -> Schedule:
    """The schedule without backwards and gradient messages. Other actions keep their order, so ranks still agree."""
    return replace(schedule, ranks=tuple(tuple(a for a in rank if not _is_backward(a)) for rank in schedule.ranks))


def _is_backward(action: Action) -> bool:
    if isinstance(action, Send | Receive):
        return action.message.kind in (Kind.GRADIENT, Kind.LOG_SUMS, Kind.HEAD_GRADIENT)
    return isinstance(action, Backward | HeadBackward)
