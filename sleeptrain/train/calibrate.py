"""What stop rules are worth on held-out data: the result against the mean passes, by rule and threshold.

Beside the rules stand the fixed numbers of passes and the hindsight bound: the best that any rule could do that gives a
row the same passes in all its windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.data.tasks.task import Answered, Task
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import LoopSettings, ReadLogits
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.stop_rule import StopRule
from sleeptrain.sleep.until_stopped import Stopped
from sleeptrain.train.evaluate import ModelRunner, evaluate

HINDSIGHT_POINTS = 24


@dataclass(frozen=True)
class Point:
    """A result at some mean number of passes.

    passes: the mean over windows that may sleep, the wake pass counted.
    value: `accuracy` of a task, else the mean loss in nats a token.
    setting: the number of passes, the threshold of a rule, or None in hindsight.
    metrics: the task's other metrics.
    """

    passes: float
    value: float
    setting: float | None = None
    metrics: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Calibration:
    """The points of a checkpoint. quantity: `accuracy` or `loss`. rules: {rule: points by ascending threshold}."""

    quantity: str
    fixed: list[Point]
    rules: dict[str, list[Point]]
    hindsight: list[Point]

    def best(self, rule: str, budget: float) -> Point | None:
        """The best point of a rule within this mean number of passes; None if all its points need more."""
        within = [point for point in self.rules[rule] if point.passes <= budget]
        if not within:
            return None
        sign = 1 if self.quantity == "accuracy" else -1
        return max(within, key=lambda point: (sign * point.value, -point.passes))


class _Rows:
    """A task, or none, that keeps the answers of each row."""

    def __init__(self, task: Task | None) -> None:
        self._task = task
        self.answered: list[Answered] = []

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        self.answered = list(answered)
        return {"accuracy": 0.0} if self._task is None else self._task.metrics(answered)

    def guessing(self) -> dict[str, float]:
        return {} if self._task is None else self._task.guessing()

    def values_B(self) -> torch.Tensor:
        """The score of each row with a target, fp64, the higher the better: right targets, or minus the summed loss."""
        values = [a.loss_BT.neg() if self._task is None else a.right_BT for a in self.answered]
        wanted = torch.cat([a.wanted_BT.any(1) for a in self.answered])
        return torch.cat([value.double().sum(1) for value in values])[wanted]

    def targets(self) -> int:
        return sum(int(a.wanted_BT.sum()) for a in self.answered)


@dataclass(frozen=True)
class _ScoringRunner(ModelRunner):
    """Keeps the scores of all decisions."""

    scores: list[float]

    def until_stopped(
        self,
        batch: Batch,
        rounds: Sequence[Round],
        settings: LoopSettings,
        rule: StopRule,
        read_logits: ReadLogits | None,
    ) -> Stopped:
        stopped = super().until_stopped(batch, rounds, settings, rule, read_logits)
        self.scores.extend(score for _, of_rows in stopped.scores.values() for score in of_rows)
        return stopped


def calibrate(
    model: Hybrid,
    sets: Callable[[], Mapping[str, Iterable[Batch]]],
    config: Config,
    task: Task | None,
    rules: Sequence[str],
    num_thresholds: int = 12,
) -> Calibration:
    """The results at each fixed N up to `sleep.passes`, at thresholds of each rule, and in hindsight.

    sets: returns the held-out batches, again for each evaluation. rules: among STOP_RULES; `gate` needs
    `sleep.stop_gate`. num_thresholds: thresholds of a rule, at equal shares of the scores that it gives where no row
    stops. The rows of each evaluation are the same.
    """
    rows = _Rows(task)

    def point(n: int, setting: float, runner: ModelRunner | None = None, **changes: Any) -> Point:
        changed = replace(config, sleep=replace(config.sleep, **changes))
        result = evaluate(model, sets(), changed, changed.sleep.window, [n], rows, runner or ModelRunner(model))  # type: ignore[arg-type]
        key = str(n)
        value = result["accuracy"][key] if task is not None else -float(rows.values_B().sum()) / rows.targets()
        return Point(result.get("passes", {}).get(key, float(n)), value, setting, result["metrics"][key])

    with in_precision(config.train, model):
        fixed, by_passes = [], []
        for n in range(1, config.sleep.passes + 1):
            fixed.append(point(n, n, stop="fixed"))
            by_passes.append(rows.values_B())
        hindsight = _hindsight(torch.stack(by_passes).numpy(), rows.targets(), task is None)
        return Calibration(
            "loss" if task is None else "accuracy",
            fixed,
            {rule: _of_rule(rule, point, model, config.sleep.passes, num_thresholds) for rule in rules},
            hindsight,
        )


def _of_rule(rule: str, point: Callable[..., Point], model: Hybrid, passes: int, num_thresholds: int) -> list[Point]:
    scores: list[float] = []
    point(passes, 0.0, _ScoringRunner(model, scores), stop=rule, min_passes=passes)  # no row stops
    finite = np.array([max(score, 0.0) for score in scores if np.isfinite(score)])
    if not len(finite):
        return []
    thresholds = np.unique(np.quantile(finite, np.linspace(0, 1, num_thresholds)))
    return [point(passes, float(t), stop=rule, stop_threshold=float(t)) for t in thresholds]


def _hindsight(values_NB: np.ndarray, targets: int, is_loss: bool) -> list[Point]:
    """The best mean value for each mean number of passes, if each row takes the passes that suit it.

    values_NB: the score of each row with 1..N passes. For each price of a pass every row takes the N that is worth most
    to it; the points are those of the upper hull, on which no choice of passes for rows can improve.
    """
    num_passes = np.arange(1, len(values_NB) + 1)
    gains = np.abs(values_NB[:, None] - values_NB[None])
    shares = np.linspace(0, 1, HINDSIGHT_POINTS)
    prices = np.unique(np.quantile(gains[gains > 0], shares)) if gains.any() else np.zeros(0)
    points = {}
    # A gain is shared by one to N - 1 passes, so that prices below it matter, too.
    for price in [0.0, *(p * share for p in prices for share in (0.34, 0.51, 1.01))]:
        chosen_B = np.argmax(values_NB - price * num_passes[:, None] - 1e-12 * num_passes[:, None], axis=0)
        total = float(values_NB[chosen_B, np.arange(values_NB.shape[1])].sum()) / targets
        passes = float(num_passes[chosen_B].mean())
        points[passes] = Point(passes, -total if is_loss else total)
    return [points[passes] for passes in sorted(points)]
