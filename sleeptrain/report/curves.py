"""Curves of evaluations: a quantity over the steps of each run, with mean and spread over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sleeptrain.report.groups import Group, Section, seeds
from sleeptrain.report.runs import ReadRun
from sleeptrain.train.logging.metrics import mean_later_windows

Evaluated = dict[str, Any]  # `eval` of a record


@dataclass(frozen=True)
class Quantity:
    """A number in each evaluation.

    name: used in file names.
    title: for the user.
    read: function of (eval, passes) that returns the number, or None if the evaluation does not have it.
    share: the number is a share, 0..1, shown in per cent.
    unit: if it is no share.
    line: the quantity whose guessing lines apply; empty: `name`.
    """

    name: str
    title: str
    read: Callable[[Evaluated, str], float | None]
    share: bool = True
    unit: str = ""
    line: str = ""


@dataclass(frozen=True)
class Breakdown:
    """A quantity by difficulty.

    by: what the keys measure, such as hops.
    keys: in order, such as k=1, k=2.
    read: function of (eval, passes, key), as in `Quantity`.
    name, title, line, share, unit: as in `Quantity`.
    """

    name: str
    title: str
    by: str
    keys: list[str]
    read: Callable[[Evaluated, str, str], float | None]
    line: str
    share: bool = True
    unit: str = ""

    def of(self, key: str) -> Quantity:
        """The quantity at one key."""
        read = self.read
        name, read_key = f"{self.name}-{key}", lambda evaluation, n: read(evaluation, n, key)
        return Quantity(name, key, read_key, self.share, self.unit, self.line)


@dataclass(frozen=True)
class Band:
    """Statistics of a quantity over the runs of a group.

    steps: the steps at which all runs were evaluated.
    flops: mean training FLOPs of the runs up to each step; None if not known.
    mean, low, high: mean, minimum and maximum at each step.
    runs: number of runs.
    seeds: number of seeds. Runs with equal seeds count as one.
    """

    steps: list[int]
    flops: list[float] | None
    mean: list[float]
    low: list[float]
    high: list[float]
    runs: int
    seeds: int

    @property
    def end(self) -> int | None:
        """The last step; None if there is none."""
        return self.steps[-1] if self.steps else None

    @property
    def no_end(self) -> str:
        """The reason why there is no last step, if there are runs."""
        return f"no step that all {self.runs} have evaluated"


BY = {"hops": "hops", "ops": "operations"}
METRICS = {"bits": "Held-out accuracy by bits", "sampled": "Held-out accuracy to expect of drawn labels"}


def most_passes(evaluation: Evaluated) -> str:
    """The N of training at the time of the evaluation: the largest N that was evaluated."""
    return max(evaluation["loss"], key=int)


def quantities(section: Section) -> list[Quantity]:
    """The quantities that are not by difficulty: accuracy, loss, other metrics, loss of each held-out set."""
    evaluations = _evaluations(section)
    result = []
    if any(e.get("accuracy") for e in evaluations):
        result.append(Quantity("accuracy", "Held-out accuracy", lambda e, n: e.get("accuracy", {}).get(n)))
    where = "windows 2..K" if section.source == "shards" else "the answers' windows"
    nats = {"share": False, "unit": "nats a token"}
    result.append(
        Quantity("loss", f"Held-out loss of {where}", lambda e, n: _later(e["loss"], n), **nats)  # type: ignore[arg-type]
    )
    for name in _names(e.get("metrics", {}) for e in evaluations):
        if any(isinstance(m.get(name), int | float) for e in evaluations for m in e["metrics"].values()):
            result.append(Quantity(name, METRICS.get(name, f"Held-out {name}"), _metric(name)))
    for name in dict.fromkeys(name for e in evaluations for name in e.get("sets", {})):
        result.append(Quantity(f"loss-{name}", f"Held-out loss of {name}, {where}", _set(name), **nats))  # type: ignore[arg-type]
    return result


def breakdowns(section: Section) -> list[Breakdown]:
    """The quantities by difficulty: metrics named `..._by_...`, and for text the loss by window."""
    evaluations = _evaluations(section)
    result = []
    for name in _names(e.get("metrics", {}) for e in evaluations):
        values = [m[name] for e in evaluations for m in e.get("metrics", {}).values() if name in m]
        keys = {key for value in values if isinstance(value, dict) for key in value}
        if keys:
            what, _, by = name.partition("_by_")
            ordered = sorted(keys, key=lambda key: [int(digits) for digits in re.findall(r"\d+", key)])
            share = what != "loss"
            by, unit = BY.get(by, by), "" if share else "nats a target"
            result.append(Breakdown(name, f"Held-out {what} by {by}", by, ordered, _keyed(name), what, share, unit))
    if section.source == "shards" and evaluations:
        most = max(len(losses) for e in evaluations for losses in e["loss"].values())
        keys_ = [str(number) for number in range(1, most + 1)]
        title = "Held-out loss by window"
        result.append(Breakdown("loss_by_window", title, "window", keys_, _window, "loss", False, "nats a token"))
    return result


def curve(run: ReadRun, quantity: Quantity, awake: bool = False) -> dict[int, float]:
    """{step: value} of a run, without missing values. awake: evaluated with one pass; else with the N of training."""
    points = {}
    for record in run.evaluations:
        value = quantity.read(record["eval"], "1" if awake else most_passes(record["eval"]))
        if value is not None:
            points[record["step"]] = value
    return points


def band(group: Group, quantity: Quantity, awake: bool = False) -> Band:
    """The statistics of a group's runs, without runs that have no value. awake: as for `curve`."""
    runs = [(run, points) for run in group.runs if (points := curve(run, quantity, awake))]
    steps = sorted(set.intersection(*(set(points) for _, points in runs))) if runs else []
    values = [[points[step] for _, points in runs] for step in steps]
    flops = [[run.flops_until(step) for run, _ in runs] for step in steps]
    known = [[cost for cost in costs if cost is not None] for costs in flops]
    return Band(
        steps,
        [statistics.mean(costs) for costs in known] if all(known) else None,
        [statistics.fmean(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
        len(runs),
        len({seeds(run) for run, _ in runs}),
    )


def ends_early(section: Section, group: Group, b: Band) -> bool:
    """True if the band ends at an earlier step than the last evaluation of its section and difficulty."""
    runs = [run for other in section.groups if other.difficulty == group.difficulty for run in other.runs]
    furthest = max((record["step"] for run in runs for record in run.evaluations), default=0)
    return b.end is not None and b.end < furthest


def counted(bands: Sequence[Band]) -> str:
    """`3 seeds`; `1 to 3 seeds` if bands differ; `3 runs of 2 seeds`; empty if each band has only one run."""
    if all(b.runs == 1 for b in bands):
        return ""
    of_seeds = _count([b.seeds for b in bands], "seed")
    repeated = any(b.runs > b.seeds for b in bands)
    return f"{_count([b.runs for b in bands], 'run')} of {of_seeds}" if repeated else of_seeds


def _count(numbers: Sequence[int], what: str) -> str:
    return f"{span(numbers)} {what}{'' if max(numbers) == 1 else 's'}"


def span(numbers: Sequence[int]) -> str:
    """`500`, or `500 to 2,000` if they differ."""
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def guessing(groups: Sequence[Group], quantity: Quantity) -> dict[str, list[float]]:
    """{guessing line: its distinct values over the runs} for a quantity."""
    lines: dict[str, list[float]] = {}
    for run in (run for group in groups for run in group.runs):
        for record in run.evaluations[-1:]:
            for name, value in record["eval"].get("guessing", {}).items():
                if _line_of(name) == (quantity.line or quantity.name) and value not in lines.setdefault(name, []):
                    lines[name].append(value)
    return {name: values for name, values in lines.items() if values}


def _line_of(name: str) -> str:
    """The quantity that a line of `Task.guessing` applies to: the suffix of its name, else accuracy."""
    last = name.rpartition("_")[2]
    return last if last in ("loss", "bits", "sampled") else "accuracy"


def _evaluations(section: Section) -> list[Evaluated]:
    return [record["eval"] for run in section.runs for record in run.evaluations]


def _names(metrics: Any) -> list[str]:
    return list(dict.fromkeys(name for by_passes in metrics for by_name in by_passes.values() for name in by_name))


def _later(losses: dict[str, list[float | None]], n: str) -> float | None:
    return mean_later_windows(losses[n]) if n in losses else None


def _metric(name: str) -> Callable[[Evaluated, str], float | None]:
    return lambda evaluation, n: evaluation.get("metrics", {}).get(n, {}).get(name)


def _set(name: str) -> Callable[[Evaluated, str], float | None]:
    return lambda evaluation, n: _later(evaluation.get("sets", {}).get(name, {}).get("loss", {}), n)


def _keyed(name: str) -> Callable[[Evaluated, str, str], float | None]:
    return lambda evaluation, n, key: evaluation.get("metrics", {}).get(n, {}).get(name, {}).get(key)


def _window(evaluation: Evaluated, n: str, key: str) -> float | None:
    losses, index = evaluation["loss"].get(n, []), int(key) - 1
    return losses[index] if index < len(losses) else None
