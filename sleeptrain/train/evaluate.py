"""Held-out loss, window by window, with and without sleep."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.ahead import never
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import LoopSettings, ReadLogits, loop_settings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_batch, window_spans
from sleeptrain.tasks.rule110 import exact_accuracy
from sleeptrain.train.step import autocast

# {"loss": {passes: [mean loss of window 1..K]}, "accuracy": {passes: share}, "sets": {name: {"loss": ...}}}
Evaluation = dict[str, Any]

# The summed loss of each window of a batch that has one, for its rounds.
WindowLosses = Callable[[Batch, Sequence[Round], LoopSettings, ReadLogits | None], Mapping[int, torch.Tensor]]


class EvaluationStopped(Exception):
    """The run has been asked to stop, and the evaluation is given up."""


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


@dataclass
class _Windows:
    """Sums of losses and counts of targets, window by window."""

    sums: list[float]
    counts: list[int]

    def means(self) -> list[float | None]:
        return [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]

    def __add__(self, other: _Windows) -> _Windows:
        return _Windows(
            [a + b for a, b in zip(self.sums, other.sums, strict=True)],
            [a + b for a, b in zip(self.counts, other.counts, strict=True)],
        )


@torch.no_grad()
def evaluate(
    model: Hybrid,
    sets: Mapping[str, Iterable[Batch]],
    config: Config,
    window: int,
    passes: Iterable[int],
    count_answers: bool,
    run: WindowLosses | None = None,
    stop: Callable[[], bool] = never,
) -> Evaluation:
    """Loss of windows 1..K (nats a token; None where a window has no target) for each number of passes.

    sets: batches of each held-out set. Returns {"loss": {"1": [...], "4": [...]}} over all targets of all sets; with
    `count_answers` {"accuracy": {"1": ...}}: the share of rows whose targets are all right by argmax; where there are
    several sets {"sets": {name: {"loss": ...}}}. run: how the rounds of a batch are run where the model is in parts.
    stop: asked before each batch is read and before it is run; where it says so, raises EvaluationStopped.
    """
    run = run or (lambda batch, rounds, *how: run_rounds(model, batch, rounds, model.empty_state(), *how)[0])
    batches = {name: list(_until(stop, given)) for name, given in sets.items()}
    result: Evaluation = {"loss": {}} | ({"accuracy": {}} if count_answers else {})
    if len(batches) > 1:
        result["sets"] = {name: {"loss": {}} for name in batches}
    for n in passes:
        answers = _Answers() if count_answers else None
        by_set = {
            name: _window_losses(run, model, given, config, window, n, answers, stop) for name, given in batches.items()
        }
        result["loss"][str(n)] = reduce(operator.add, by_set.values()).means()
        if answers is not None:
            result["accuracy"][str(n)] = answers.accuracy()
        for name in result.get("sets", {}):
            result["sets"][name]["loss"][str(n)] = by_set[name].means()
    return result


def _window_losses(
    run: WindowLosses,
    model: Hybrid,
    batches: list[Batch],
    config: Config,
    window: int,
    passes: int,
    answers: _Answers | None,
    stop: Callable[[], bool],
) -> _Windows:
    settings = loop_settings(config.sleep, window, model.num_layers, recompute="none")
    spans = window_spans(batches[0].tokens_BT.shape[1], window)
    found = _Windows([0.0] * len(spans), [0] * len(spans))
    for batch in _until(stop, batches):
        rounds = plan_batch(batch, window, passes, config.sleep)
        with autocast(config, model.device):
            losses = run(batch, rounds, settings, None if answers is None else answers.read)
        for index, (start, end) in enumerate(spans):
            found.counts[index] += int((batch.targets_BT[:, start:end] != IGNORE).sum())
            if index in losses:
                found.sums[index] += float(losses[index])
    return found


def _until(stop: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if stop():
            raise EvaluationStopped
        yield batch
