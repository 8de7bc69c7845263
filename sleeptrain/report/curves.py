"""What evaluations say, as curves: a quantity over the steps of each run, and the mean and spread over seeds."""

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
    """A number of each evaluation.

    name: of files. share: 0..1, shown in per cent; else in `unit`. read(eval, passes): None where it is not there.
    line: the quantity whose lines of guessing it is held against, `name` if empty.
    """

    name: str
    title: str
    read: Callable[[Evaluated, str], float | None]
    share: bool = True
    unit: str = ""
    line: str = ""


@dataclass(frozen=True)
class Breakdown:
    """A quantity by difficulty. keys: in order, such as k=1, k=2. by: what a key tells. line: as of a `Quantity`."""

    name: str
    title: str
    by: str
    keys: list[str]
    read: Callable[[Evaluated, str, str], float | None]
    line: str
    share: bool = True
    unit: str = ""

    def of(self, key: str) -> Quantity:
        read = self.read
        name, one = f"{self.name}-{key}", lambda found, n: read(found, n, key)
        return Quantity(name, key, one, self.share, self.unit, self.line)


@dataclass(frozen=True)
class Band:
    """Of the runs of a group: mean, least and most at each step that all of them have evaluated.

    flops: mean of their training FLOPs until there; None where not known. runs, seeds: how many there are; runs that
    differ in no seed are one seed.
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
        """The last step, if any."""
        return self.steps[-1] if self.steps else None

    @property
    def no_end(self) -> str:
        """Why there is no last step, where there are runs."""
        return f"no step that all {self.runs} have evaluated"


BY = {"hops": "hops", "ops": "operations"}
METRICS = {"bits": "Held-out accuracy by bits", "sampled": "Held-out accuracy to expect of drawn labels"}


def most_passes(found: Evaluated) -> str:
    """The N that was trained when this was evaluated: the most that it holds."""
    return max(found["loss"], key=int)


def quantities(section: Section) -> list[Quantity]:
    """What the evaluations hold besides what is by difficulty: accuracy, loss, other metrics, loss of each set."""
    evaluations = _evaluations(section)
    found = []
    if any(e.get("accuracy") for e in evaluations):
        found.append(Quantity("accuracy", "Held-out accuracy", lambda e, n: e.get("accuracy", {}).get(n)))
    where = "windows 2..K" if section.source == "shards" else "the answers' windows"
    nats = {"share": False, "unit": "nats a token"}
    found.append(
        Quantity("loss", f"Held-out loss of {where}", lambda e, n: _later(e["loss"], n), **nats)  # type: ignore[arg-type]
    )
    for name in _names(e.get("metrics", {}) for e in evaluations):
        if any(isinstance(m.get(name), int | float) for e in evaluations for m in e["metrics"].values()):
            found.append(Quantity(name, METRICS.get(name, f"Held-out {name}"), _metric(name)))
    for name in dict.fromkeys(name for e in evaluations for name in e.get("sets", {})):
        found.append(Quantity(f"loss-{name}", f"Held-out loss of {name}, {where}", _set(name), **nats))  # type: ignore[arg-type]
    return found


def breakdowns(section: Section) -> list[Breakdown]:
    """What evaluations hold by difficulty: metrics named `..._by_...`, and of text the loss by window."""
    evaluations = _evaluations(section)
    found = []
    for name in _names(e.get("metrics", {}) for e in evaluations):
        values = [m[name] for e in evaluations for m in e.get("metrics", {}).values() if name in m]
        keys = {key for value in values if isinstance(value, dict) for key in value}
        if keys:
            what, _, by = name.partition("_by_")
            ordered = sorted(keys, key=lambda key: [int(digits) for digits in re.findall(r"\d+", key)])
            share = what != "loss"
            by, unit = BY.get(by, by), "" if share else "nats a target"
            found.append(Breakdown(name, f"Held-out {what} by {by}", by, ordered, _keyed(name), what, share, unit))
    if section.source == "shards" and evaluations:
        most = max(len(losses) for e in evaluations for losses in e["loss"].values())
        keys_ = [str(number) for number in range(1, most + 1)]
        title = "Held-out loss by window"
        found.append(Breakdown("loss_by_window", title, "window", keys_, _window, "loss", False, "nats a token"))
    return found


def curve(run: ReadRun, quantity: Quantity, awake: bool = False) -> dict[int, float]:
    """By step. awake: with one pass, else with the N that was trained. Values that are not there are left out."""
    found = {}
    for record in run.evaluations:
        value = quantity.read(record["eval"], "1" if awake else most_passes(record["eval"]))
        if value is not None:
            found[record["step"]] = value
    return found


def band(group: Group, quantity: Quantity, awake: bool = False) -> Band:
    """Runs without any value are left out."""
    runs = [(run, found) for run in group.runs if (found := curve(run, quantity, awake))]
    steps = sorted(set.intersection(*(set(found) for _, found in runs))) if runs else []
    values = [[found[step] for _, found in runs] for step in steps]
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


def behind(section: Section, group: Group, found: Band) -> bool:
    """Whether a group's band ends before others of its section and difficulty have been evaluated last."""
    runs = [run for other in section.groups if other.difficulty == group.difficulty for run in other.runs]
    furthest = max((record["step"] for run in runs for record in run.evaluations), default=0)
    return found.end is not None and found.end < furthest


def counted(found: Sequence[Band]) -> str:
    """`3 seeds`, or `1 to 3 seeds` where bands differ; `3 runs of 2 seeds`; nothing where each band is of one run."""
    if all(one.runs == 1 for one in found):
        return ""
    of_seeds = _count([one.seeds for one in found], "seed")
    repeated = any(one.runs > one.seeds for one in found)
    return f"{_count([one.runs for one in found], 'run')} of {of_seeds}" if repeated else of_seeds


def _count(numbers: Sequence[int], what: str) -> str:
    return f"{span(numbers)} {what}{'' if max(numbers) == 1 else 's'}"


def span(numbers: Sequence[int]) -> str:
    """`500`, or `500 to 2,000` where they differ."""
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def guessing(groups: Sequence[Group], quantity: Quantity) -> dict[str, list[float]]:
    """The lines that guessing reaches for a quantity, and their values, each once: runs may differ."""
    found: dict[str, list[float]] = {}
    for run in (run for group in groups for run in group.runs):
        for record in run.evaluations[-1:]:
            for name, value in record["eval"].get("guessing", {}).items():
                if _line_of(name) == (quantity.line or quantity.name) and value not in found.setdefault(name, []):
                    found[name].append(value)
    return {name: values for name, values in found.items() if values}


def _line_of(name: str) -> str:
    """The quantity that a line of `Task.guessing` is to be held against; its name says so, accuracy unless it does."""
    last = name.rpartition("_")[2]
    return last if last in ("loss", "bits", "sampled") else "accuracy"


def _evaluations(section: Section) -> list[Evaluated]:
    return [record["eval"] for run in section.runs for record in run.evaluations]


def _names(metrics: Any) -> list[str]:
    return list(dict.fromkeys(name for by_passes in metrics for own in by_passes.values() for name in own))


def _later(losses: dict[str, list[float | None]], n: str) -> float | None:
    return mean_later_windows(losses[n]) if n in losses else None


def _metric(name: str) -> Callable[[Evaluated, str], float | None]:
    return lambda found, n: found.get("metrics", {}).get(n, {}).get(name)


def _set(name: str) -> Callable[[Evaluated, str], float | None]:
    return lambda found, n: _later(found.get("sets", {}).get(name, {}).get("loss", {}), n)


def _keyed(name: str) -> Callable[[Evaluated, str, str], float | None]:
    return lambda found, n, key: found.get("metrics", {}).get(n, {}).get(name, {}).get(key)


def _window(found: Evaluated, n: str, key: str) -> float | None:
    losses, at = found["loss"].get(n, []), int(key) - 1
    return losses[at] if at < len(losses) else None
