"""Held-out loss, window by window, with and without sleep."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_batch, window_spans
from sleeptrain.tasks.rule110 import exact_accuracy
from sleeptrain.train.step import autocast

# {"loss": {passes: [mean loss of window 1..K]}, "accuracy": {passes: share}}
Evaluation = dict[str, dict[str, list[float | None] | float]]


class _Answers:
    """Collects the answers of each row: logits [rows, answers, V] and labels [rows, answers]."""

    def __init__(self) -> None:
        self._logits: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def read(self, r: Round, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        self._logits.append(logits_NV.unflatten(0, (len(r.rows), -1)))
        self._labels.append(targets_N.unflatten(0, (len(r.rows), -1)))

    def accuracy(self) -> float:
        return exact_accuracy(torch.cat(self._logits), torch.cat(self._labels))


@torch.no_grad()
def evaluate(
    model: Hybrid, batches: Iterable[Batch], config: Config, window: int, passes: Iterable[int], count_answers: bool
) -> Evaluation:
    """Loss of windows 1..K (nats a token; None where a window has no target) for each number of passes.

    Returns {"loss": {"1": [...], "4": [...]}} and, with `count_answers`, {"accuracy": {"1": ...}}: the share of rows
    whose targets are all right by argmax.
    """
    batches = list(batches)
    losses: dict[str, list[float | None] | float] = {}
    accuracy: dict[str, list[float | None] | float] = {}
    for n in passes:
        answers = _Answers() if count_answers else None
        losses[str(n)] = _window_losses(model, batches, config, window, n, answers)
        if answers is not None:
            accuracy[str(n)] = answers.accuracy()
    return {"loss": losses, "accuracy": accuracy} if count_answers else {"loss": losses}


def _window_losses(
    model: Hybrid, batches: list[Batch], config: Config, window: int, passes: int, answers: _Answers | None
) -> list[float | None]:
    settings = loop_settings(config, window, model.num_layers, recompute="none")
    spans = window_spans(batches[0].tokens_BT.shape[1], window)
    sums, counts = [0.0] * len(spans), [0] * len(spans)
    for batch in batches:
        rounds = plan_batch(batch, window, passes, config.sleep)
        with autocast(config, model.device):
            losses, _ = run_rounds(
                model, batch, rounds, model.empty_state(), settings, None if answers is None else answers.read
            )
        for index, (start, stop) in enumerate(spans):
            counts[index] += int((batch.targets_BT[:, start:stop] != IGNORE).sum())
            if index in losses:
                sums[index] += float(losses[index])
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
