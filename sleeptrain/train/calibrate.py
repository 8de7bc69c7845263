"""What stop rules are worth on held-out data: the result against the mean passes, by rule and threshold.

Thresholds are chosen on half of the held-out rows and judged on the others, so that a choice that suits a few rows by
chance is not counted as a gain. Beside the rules stand the fixed numbers of passes and the hindsight bound: the best
that any rule could do that gives a row the same passes in all its windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.tasks.task import Answered, Task
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.until_stopped import RuledRounds, Stopped
from sleeptrain.train.calibration_rows import Halves, Sets
from sleeptrain.train.evaluate import ModelRunner, evaluate

HINDSIGHT_POINTS = 24
# How much worse than all passes a cheap threshold may be: half a point of accuracy, or this many nats a token.
TOLERANCE = 0.005


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
class Curves:
    """The points of a checkpoint on some rows.

    fixed: by 1..N passes. rules: {rule: points by ascending threshold}.
    """

    fixed: list[Point]
    rules: dict[str, list[Point]]


@dataclass(frozen=True)
class Choice:
    """A threshold that was chosen on the calibration rows.

    reason: why it was chosen. calibrated, judged: its points on the rows that chose it and on the judged rows.
    share: the share of the sleep passes that the judged rows take.
    """

    reason: str
    threshold: float
    calibrated: Point
    judged: Point
    share: float


@dataclass(frozen=True)
class Calibration:
    """What a checkpoint's stop rules are worth.

    quantity: `accuracy` or `loss`. rows: {"calibration", "judged": number of rows}.
    calibrated, judged: the points on the rows of each half; the thresholds of a rule are the same in both.
    hindsight: of the judged rows.
    """

    quantity: str
    rows: dict[str, int]
    calibrated: Curves
    judged: Curves
    hindsight: list[Point]

    def choices(self, rule: str, budget: float) -> list[Choice]:
        """The best threshold within this many mean passes, and the cheapest that is as good as all passes, within
        `TOLERANCE`; each is left out if the calibration rows have none."""
        points, most = self.calibrated.rules[rule], self.calibrated.fixed[-1]
        sign = 1 if self.quantity == "accuracy" else -1
        within = [i for i, p in enumerate(points) if p.passes <= budget]
        good = [i for i, p in enumerate(points) if sign * (p.value - most.value) >= -TOLERANCE]
        margin = "half a point" if self.quantity == "accuracy" else f"{TOLERANCE} nats"
        found = []
        if within:
            best = max(within, key=lambda i: (sign * points[i].value, -points[i].passes))
            found.append(self._choice(rule, best, f"the best within {budget:.2f} mean passes"))
        if good:
            cheapest = min(good, key=lambda i: (points[i].passes, -sign * points[i].value))
            found.append(self._choice(rule, cheapest, f"the cheapest within {margin} of N={most.passes:.0f}"))
        return found

    def _choice(self, rule: str, index: int, reason: str) -> Choice:
        calibrated, judged = self.calibrated.rules[rule][index], self.judged.rules[rule][index]
        assert calibrated.setting is not None and calibrated.setting == judged.setting
        share = (judged.passes - 1) / (self.judged.fixed[-1].passes - 1)
        return Choice(reason, calibrated.setting, calibrated, judged, share)


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

    def until_stopped(self, ruled: RuledRounds) -> Stopped:
        stopped = super().until_stopped(ruled)
        self.scores.extend(score for _, of_rows in stopped.scores.values() for score in of_rows)
        return stopped


def calibrate(
    model: Hybrid,
    halves: Halves,
    config: Config,
    task: Task | None,
    rules: Sequence[str],
    num_thresholds: int = 12,
) -> Calibration:
    """The results at each fixed N up to `sleep.passes`, at thresholds of each rule, and in hindsight.

    halves: the rows that choose thresholds, and those that judge them. rules: among STOP_RULES; `gate` needs
    `sleep.stop_gate`. num_thresholds: thresholds of a rule, at equal shares of the scores that it gives to the
    calibration rows where no row stops.
    """
    passes, thresholds = config.sleep.passes, dict[str, list[float]]()
    calibrated, judged = (_Judge(model, sets, config, task) for sets in (halves.calibration, halves.judged))
    with in_precision(config.train, model):
        for rule in rules:
            thresholds[rule] = _thresholds(calibrated, rule, passes, num_thresholds)
        (chosen_on, _), (judged_on, values_NB) = (judge.curves(passes, thresholds) for judge in (calibrated, judged))
    return Calibration(
        "loss" if task is None else "accuracy",
        {"calibration": _num_rows(halves.calibration), "judged": _num_rows(halves.judged)},
        chosen_on,
        judged_on,
        _hindsight(values_NB.numpy(), judged.rows.targets(), task is None),
    )


class _Judge:
    """Evaluates the same rows with any number of passes and under any rule."""

    def __init__(self, model: Hybrid, sets: Sets, config: Config, task: Task | None) -> None:
        self.model, self._sets, self._config, self._task = model, sets, config, task
        self.rows = _Rows(task)

    def curves(self, most: int, thresholds: Mapping[str, Sequence[float]]) -> tuple[Curves, torch.Tensor]:
        """(the points, [most, B]: what each row is worth with 1, 2, ... passes). thresholds: of each rule."""
        fixed, values = list[Point](), list[torch.Tensor]()
        for n in range(1, most + 1):
            fixed.append(self.point(n, n, stop="fixed"))
            values.append(self.rows.values_B())
        points = {
            rule: [self.point(most, t, stop=rule, stop_threshold=t) for t in of_rule]
            for rule, of_rule in thresholds.items()
        }
        return Curves(fixed, points), torch.stack(values)

    def point(self, n: int, setting: float, runner: ModelRunner | None = None, **changes: Any) -> Point:
        """The result with at most n passes. changes: settings of `sleep`."""
        config = replace(self._config, sleep=replace(self._config.sleep, **changes))
        runner = runner or ModelRunner(self.model)
        result = evaluate(self.model, self._sets, config, config.sleep.window, [n], self.rows, runner)  # type: ignore[arg-type]
        key, rows = str(n), self.rows
        value = -float(rows.values_B().sum()) / rows.targets() if self._task is None else result["accuracy"][key]
        return Point(result.get("passes", {}).get(key, float(n)), value, setting, result["metrics"][key])


def _thresholds(judge: _Judge, rule: str, passes: int, num_thresholds: int) -> list[float]:
    """Thresholds at equal shares of the finite scores that the rule gives where no row stops; ascending."""
    scores: list[float] = []
    judge.point(passes, 0.0, _ScoringRunner(judge.model, scores), stop=rule, min_passes=passes)
    finite = np.array([max(score, 0.0) for score in scores if np.isfinite(score)])
    if not len(finite):
        return []
    return [float(t) for t in np.unique(np.quantile(finite, np.linspace(0, 1, num_thresholds)))]


def _num_rows(sets: Sets) -> int:
    return sum(len(batch.tokens_BT) for batches in sets.values() for batch in batches)


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
