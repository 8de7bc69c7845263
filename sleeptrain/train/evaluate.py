"""Held-out loss, window by window, with and without sleep."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from sleeptrain.config.schema import Config
from sleeptrain.data.ahead import never
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.source import Source
from sleeptrain.data.tasks.task import Answered, Task
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import LoopSettings, ReadLogits, loop_settings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.rounds import Round, plan_batch, window_spans

# {"loss": {passes: [mean loss of window 1..K]}, "sets": {name: {"loss": ...}}}; with a task also {"accuracy": {passes:
# share}, "metrics": {passes: {name: value}}, "guessing": {name: value}}
Evaluation = dict[str, Any]

# Runs the rounds of a batch in `train.precision`; returns the summed loss of each window that predicts.
WindowLosses = Callable[[Batch, Sequence[Round], LoopSettings, ReadLogits | None], Mapping[int, torch.Tensor]]


class EvaluationStopped(Exception):
    """The run is to stop, so the evaluation was cancelled."""


class _Answers:
    """The model's predictions and losses at a batch's targets, collected from the rounds that predict."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._predicted_BT = torch.full_like(batch.targets_BT, IGNORE)
        self._loss_BT = torch.zeros(batch.targets_BT.shape)

    def read(self, r: Round, first: int, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        rows = torch.tensor(r.rows)
        row_N, column_N = (self._batch.targets_BT[rows, r.start : r.stop] != IGNORE).nonzero(as_tuple=True)
        chunk = slice(first, first + len(targets_N))
        at = (rows[row_N[chunk]], r.start + column_N[chunk])
        self._predicted_BT[at] = logits_NV.argmax(-1).cpu()
        self._loss_BT[at] = F.cross_entropy(logits_NV, targets_N, reduction="none").float().cpu()

    def all(self) -> Answered:
        return Answered(self._batch, self._predicted_BT, self._loss_BT)


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


def held_out(source: Source, config: Config) -> dict[str, Iterator[Batch]]:
    """The batches of each held-out set for an evaluation, the same throughout a run.

    For shards: at most `train.eval_batches` batches of at most 8 rows. For a task: the rows of `train.eval_batches`
    batches of `data.batch`, in micro-batches of the training.
    """
    rows = config.data.batch
    num_batches, batch_rows = config.train.eval_batches, min(rows, 8)
    if source.task is not None:
        batch_rows = config.train.micro_batch or rows
        num_batches = -(-num_batches * rows // batch_rows)
    return {name: source.validation_batches(name, batch_rows, num_batches) for name in source.held_out}


@torch.no_grad()
def evaluate(
    model: Hybrid,
    sets: Mapping[str, Iterable[Batch]],
    config: Config,
    window: int,
    passes: Iterable[int],
    task: Task | None,
    run: WindowLosses | None = None,
    stop: Callable[[], bool] = never,
) -> Evaluation:
    """Loss of windows 1..K (nats a token; None if a window has no target) for each number of passes.

    Returns {"loss": {"1": [...], "4": [...]}} over all targets of all sets. With a task it adds {"accuracy": {"1":
    ...}, "metrics": {"1": {...}}, "guessing": {...}} (see `Task.metrics` and `Task.guessing`); with several sets it
    adds {"sets": {name: {"loss": ...}}}.
    sets: the batches of each held-out set.
    run: runs the rounds of a batch (default: on `model` in this process).
    stop: called before each batch is read and before it is run; if it returns True, EvaluationStopped is raised.
    """
    if run is None:
        with in_precision(config.train, model):
            return evaluate(model, sets, config, window, passes, task, _run_on(model), stop)
    batches = {name: list(_until(stop, set_batches)) for name, set_batches in sets.items()}
    result: Evaluation = {"loss": {}}
    if task is not None:
        result |= {"accuracy": {}, "metrics": {}, "guessing": task.guessing()}
    if len(batches) > 1:
        result["sets"] = {name: {"loss": {}} for name in batches}
    for n in passes:
        answers: list[Answered] | None = None if task is None else []
        by_set = {
            name: _window_losses(run, model, set_batches, config, window, n, answers, stop)
            for name, set_batches in batches.items()
        }
        result["loss"][str(n)] = reduce(operator.add, by_set.values()).means()
        if task is not None and answers:
            metrics = task.metrics(answers)
            result["accuracy"][str(n)] = metrics.pop("accuracy")
            result["metrics"][str(n)] = metrics
        for name in result.get("sets", {}):
            result["sets"][name]["loss"][str(n)] = by_set[name].means()
    return result


def _run_on(model: Hybrid) -> WindowLosses:
    """Runs rounds on a model in this process."""

    def run(
        batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        return run_rounds(model, batch, rounds, model.empty_state(), settings, read_logits)[0]

    return run


def _window_losses(
    run: WindowLosses,
    model: Hybrid,
    batches: list[Batch],
    config: Config,
    window: int,
    passes: int,
    answered: list[Answered] | None,
    stop: Callable[[], bool],
) -> _Windows:
    settings = loop_settings(config.sleep, window, model.num_layers, recompute="none")
    spans = window_spans(batches[0].tokens_BT.shape[1], window)
    windows = _Windows([0.0] * len(spans), [0] * len(spans))
    for batch in _until(stop, batches):
        rounds = plan_batch(batch, window, passes, config.sleep, config.parallel.token_parts)
        answers = None if answered is None else _Answers(batch)
        losses = run(batch, rounds, settings, None if answers is None else answers.read)
        if answered is not None and answers is not None:
            answered.append(answers.all())
        for index, (start, end) in enumerate(spans):
            windows.counts[index] += int((batch.targets_BT[:, start:end] != IGNORE).sum())
            if index in losses:
                windows.sums[index] += float(losses[index])
    return windows


def _until(stop: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if stop():
            raise EvaluationStopped
        yield batch
