"""Held-out loss, window by window, with and without sleep."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol, TypeVar

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
from sleeptrain.sleep.stop_rule import stop_rule
from sleeptrain.sleep.until_stopped import RuledRounds, Stopped, run_until_stopped

T = TypeVar("T")

# {"loss": {passes: [mean loss of window 1..K]}, "sets": {name: {"loss": ...}}}; with a task also {"accuracy": {passes:
# share}, "metrics": {passes: {name: value}}, "guessing": {name: value}}; under a stop rule also {"passes": {most
# passes: mean passes of the windows that may sleep, the wake pass counted}}
Evaluation = dict[str, Any]


class Runner(Protocol):
    """Runs the rounds of a batch in `train.precision`, without training. Engines implement it."""

    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        """Each window's summed loss (a scalar). It is empty in processes without the model's last layer."""

    def until_stopped(self, ruled: RuledRounds) -> Stopped:
        """The rounds under a stop rule (`run_until_stopped`), where each process holds the whole depth of the model."""


class EvaluationStopped(Exception):
    """The run is to stop, so the evaluation was cancelled."""


def _unchanged(numbers: torch.Tensor) -> torch.Tensor:
    return numbers


@dataclass(frozen=True)
class Share:
    """The batches that a process runs of an evaluation: those of index `rank`, `rank + size`, ...

    counts: this process's numbers count: it is the one of its replica that knows losses and predictions.
    in_step: replicas gather weights together (ZeRO-3), so in a turn all run modules in the same order.
    join: the sum of a tensor over all processes; all call it together.
    """

    rank: int = 0
    size: int = 1
    counts: bool = True
    in_step: bool = False
    join: Callable[[torch.Tensor], torch.Tensor] = _unchanged

    def turns(self, plans: Sequence[Sequence[Round]], stop: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
        """(index of a batch that this process runs, whether its numbers count here), turn by turn.

        plans: the rounds of each batch. Where replicas gather weights together and the batches of a turn differ in what
        their rounds run, all run all of them; where a turn has no batch for a replica, it runs the last one too.
        stop: called before each turn, as often in all processes; if it returns True, EvaluationStopped is raised.
        """
        for first in _until(stop, range(0, len(plans), self.size)):
            turn = range(first, min(first + self.size, len(plans)))
            own = first + self.rank
            if self.in_step and len({_modules_run(plans[index]) for index in turn}) > 1:
                yield from ((index, index == own) for index in turn)
            elif own in turn:
                yield own, True
            elif self.in_step:
                yield turn[-1], False


def _modules_run(rounds: Sequence[Round]) -> tuple[Round, ...]:
    """The rounds without what does not change which modules run, and in which order."""
    return tuple(replace(r, rows=(), skip=0, work=None) for r in rounds)


class Answers:
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

    def numbers(self) -> torch.Tensor:
        """Predictions and losses, [2, B, T] in fp64, which holds both exactly."""
        return torch.stack([self._predicted_BT.double(), self._loss_BT.double()])


def _answered(batch: Batch, numbers: torch.Tensor, sleeps_BK: torch.Tensor | None) -> Answered:
    predicted_BT, loss_BT = numbers.view(2, *batch.targets_BT.shape)
    passes_BK = None if sleeps_BK is None else torch.where(sleeps_BK > 0, sleeps_BK, torch.nan).float()
    return Answered(batch, predicted_BT.long(), loss_BT.float(), passes_BK)


def _sleeps(rounds: Sequence[Round], passes_KB: Sequence[Sequence[int]]) -> torch.Tensor:
    """The passes of each row in each window, fp64 [B, K]; 0 where the row may not sleep."""
    may_sleep_BK = torch.zeros(len(passes_KB[0]), len(passes_KB), dtype=torch.float64)
    for r in rounds:
        if not r.is_wake:
            may_sleep_BK[list(r.rows), r.window] = 1
    return may_sleep_BK * torch.tensor(passes_KB, dtype=torch.float64).T


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


@dataclass
class _SetResult:
    """The results of the batches of a set with one number of passes.

    windows: the sums are those of the batches that this process has run, the counts those of all batches.
    answers: the numbers of each batch (`Answers.numbers`), zeros for batches of other processes; empty without a task.
    sleeps: the passes of each batch (`_sleeps`), zeros for batches of other processes; empty without a stop rule.
    """

    windows: _Windows
    answers: list[torch.Tensor]
    sleeps: list[torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        return [torch.tensor(self.windows.sums, dtype=torch.float64), *self.answers, *self.sleeps]

    def answered(self, batches: Sequence[Batch]) -> list[Answered]:
        """The predictions for each batch; empty without a task."""
        sleeps: Sequence[torch.Tensor | None] = self.sleeps or [None] * len(batches)
        return [_answered(*of) for of in zip(batches, self.answers, sleeps, strict=False)]


def held_out(source: Source, config: Config) -> dict[str, Iterator[Batch]]:
    """The batches of each held-out set for an evaluation, the same throughout a run.

    For shards: at most `train.eval_batches` batches of at most 8 rows. For a task: the rows of `train.eval_batches`
    batches of `data.batch`, in micro-batches of the training.
    """
    num_batches, batch_rows = config.train.eval_batches, rows_of_a_batch(source, config)
    if source.task is not None:
        num_batches = -(-num_batches * config.data.batch // batch_rows)
    return {name: source.validation_batches(name, batch_rows, num_batches) for name in source.held_out}


def rows_of_a_batch(source: Source, config: Config) -> int:
    """The rows that an evaluation holds at once."""
    rows = config.data.batch
    return min(rows, 8) if source.task is None else config.train.micro_batch or rows


@torch.no_grad()
def evaluate(
    model: Hybrid,
    sets: Mapping[str, Iterable[Batch]],
    config: Config,
    window: int,
    passes: Iterable[int],
    task: Task | None,
    run: Runner | None = None,
    stop: Callable[[], bool] = never,
    share: Share | None = None,
) -> Evaluation:
    """Loss of windows 1..K (nats a token; None if a window has no target) for each number of passes.

    Returns {"loss": {"1": [...], "4": [...]}} over all targets of all sets. With a task it adds {"accuracy": {"1":
    ...}, "metrics": {"1": {...}}, "guessing": {...}} (see `Task.metrics` and `Task.guessing`); with several sets it
    adds {"sets": {name: {"loss": ...}}}.
    sets: the batches of each held-out set.
    run: runs the rounds of a batch (default: on `model` in this process).
    stop: called before each batch is read and before it is run; if it returns True, EvaluationStopped is raised.
    share: the batches that this process runs; None: all. The result is that of all batches, the same in all processes.
    """
    if run is None:
        with in_precision(config.train, model):
            return evaluate(model, sets, config, window, passes, task, ModelRunner(model), stop, share)
    share = share or Share()
    batches = {name: list(_until(stop, set_batches)) for name, set_batches in sets.items()}
    results = {
        n: {
            name: _run_set(run, model, set_batches, config, window, n, task is not None, stop, share)
            for name, set_batches in batches.items()
        }
        for n in passes
    }
    _join([result for by_set in results.values() for result in by_set.values()], share)
    evaluation: Evaluation = {"loss": {}}
    if task is not None:
        evaluation |= {"accuracy": {}, "metrics": {}, "guessing": task.guessing()}
    if len(batches) > 1:
        evaluation["sets"] = {name: {"loss": {}} for name in batches}
    for n, by_set in results.items():
        evaluation["loss"][str(n)] = reduce(operator.add, (result.windows for result in by_set.values())).means()
        answers = [answer for name in batches for answer in by_set[name].answered(batches[name])]
        if task is not None and answers:
            metrics = task.metrics(answers)
            evaluation["accuracy"][str(n)] = metrics.pop("accuracy")
            evaluation["metrics"][str(n)] = metrics
        sleeps = [sleeps_BK for result in by_set.values() for sleeps_BK in result.sleeps]
        if sleeps:
            taken = torch.cat(sleeps)
            evaluation.setdefault("passes", {})[str(n)] = float(taken[taken > 0].mean()) if taken.any() else 1.0
        for name in evaluation.get("sets", {}):
            evaluation["sets"][name]["loss"][str(n)] = by_set[name].windows.means()
    return evaluation


def _join(results: Sequence[_SetResult], share: Share) -> None:
    """Sum the numbers of all results over processes, in one operation. Each number is not zero in one process."""
    tensors = [tensor for result in results for tensor in result.tensors()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    total = share.join(flat if share.counts else torch.zeros_like(flat))
    parts = iter(total.split([tensor.numel() for tensor in tensors]))
    for result in results:
        result.windows.sums = next(parts).tolist()
        result.answers = [next(parts) for _ in result.answers]
        result.sleeps = [next(parts).view_as(sleeps_BK) for sleeps_BK in result.sleeps]


@dataclass(frozen=True)
class ModelRunner:
    """A `Runner` on a whole model in this process."""

    model: Hybrid

    def window_losses(
        self, batch: Batch, rounds: Sequence[Round], settings: LoopSettings, read_logits: ReadLogits | None
    ) -> Mapping[int, torch.Tensor]:
        return run_rounds(self.model, batch, rounds, self.model.empty_state(), settings, read_logits)[0]

    def until_stopped(self, ruled: RuledRounds) -> Stopped:
        return run_until_stopped(self.model, ruled, self.model.empty_state())


def _run_set(
    run: Runner,
    model: Hybrid,
    batches: list[Batch],
    config: Config,
    window: int,
    passes: int,
    reads_answers: bool,
    stop: Callable[[], bool],
    share: Share,
) -> _SetResult:
    settings = loop_settings(config.sleep, window, model.num_layers, recompute="none")
    spans = window_spans(batches[0].tokens_BT.shape[1], window)
    counts = [sum(int((b.targets_BT[:, start:end] != IGNORE).sum()) for b in batches) for start, end in spans]
    windows = _Windows([0.0] * len(spans), counts)
    numbers = [torch.zeros(2, *b.targets_BT.shape, dtype=torch.float64) for b in batches if reads_answers]
    rule = stop_rule(config.sleep, settings.core)
    sleeps = [torch.zeros(len(b.targets_BT), len(spans), dtype=torch.float64) for b in batches if rule is not None]
    plans = [plan_batch(b, window, passes, config.sleep, config.parallel.token_parts) for b in batches]
    for index, counted in share.turns(plans, stop):
        batch, answers = batches[index], Answers(batches[index])
        read_logits = answers.read if reads_answers else None
        passes_KB: list[list[int]] = []
        if rule is None:
            losses = run.window_losses(batch, plans[index], settings, read_logits)
        else:
            stopped = run.until_stopped(RuledRounds(batch, plans[index], settings, rule, read_logits))
            losses, passes_KB = stopped.losses, stopped.passes_KB
        if not counted:
            continue
        if reads_answers:
            numbers[index] = answers.numbers()
        if rule is not None:
            sleeps[index] = _sleeps(plans[index], passes_KB)
        for window_index, loss in losses.items():
            windows.sums[window_index] += float(loss)
    return _SetResult(windows, numbers, sleeps)


def _until(stop: Callable[[], bool], items: Iterable[T]) -> Iterator[T]:
    for item in items:
        if stop():
            raise EvaluationStopped
        yield item
