"""The tables of a page, as rows of text: last values by group and by difficulty, and all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.config.ranges import settings
from sleeptrain.report.curves import Band, Breakdown, Quantity, band, breakdowns, curve, guessing, quantities
from sleeptrain.report.groups import Group, Section, compared, seeds, symbol, value_text
from sleeptrain.report.runs import ReadRun

NONE = "–"
FIRST = {
    "model.layers": "blocks",
    "model.dim": "width",
    "sleep.passes": "N",
    "sleep.window": "L",
    "data.batch": "rows a step",
    "train.tokens": "tokens",
}


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def tables(section: Section) -> list[Table]:
    """The tables of the last evaluations, if there are any, then the table of all runs."""
    result = []
    if any(run.evaluations for run in section.runs):
        result.append(ends(section, quantities(section)))
        result += [by_difficulty(section, breakdown) for breakdown in breakdowns(section)]
    return [*result, every_run(section)]


def ends(section: Section, columns: Sequence[Quantity]) -> Table:
    """A row for each group: mean over its runs (minimum to maximum) at the last step at which all were evaluated."""
    slept = any(len(record["eval"]["loss"]) > 1 for run in section.runs for record in run.evaluations)
    header = ["runs", "seeds", "step", *(q.title for q in columns)]
    header += [f"{q.title}, kept awake (N=1)" for q in columns[:2] if slept]
    rows = []
    for group in section.groups:
        bands = [band(group, q) for q in columns]
        awake = [band(group, q, awake=True) for q in columns[:2] if slept]
        first = next((b for b in bands if b.steps), bands[0])
        step = NONE if first.end is None else f"{first.end:,}"
        values = [end_text(b, q) for b, q in zip([*bands, *awake], [*columns, *columns[:2]], strict=False)]
        rows.append([group.name, str(len({seeds(run) for run in group.runs})), step, *values])
    for title, groups in section.facets:
        rows += _guesses(section, title, groups, columns, len(header))
    note = "Mean over the runs (minimum to maximum) at the last step at which all of them were evaluated."
    return Table("Last values", header, rows, note)


def by_difficulty(section: Section, breakdown: Breakdown) -> Table:
    rows = []
    for group in section.groups:
        rows.append([group.name, *(end_text(band(group, q), q) for q in map(breakdown.of, breakdown.keys))])
    return Table(f"{breakdown.title}, last evaluation", ["runs", *breakdown.keys], rows)


def every_run(section: Section) -> Table:
    """A row for each run, with the values of its last evaluation."""
    columns = quantities(section)
    header = ["folder", "state", *map(symbol, section.differing), "steps", "tokens", "training FLOPs", "wall time"]
    header += [*(q.title for q in columns), "code", "torch, Python", "notes"]
    rows = []
    for run in section.runs:
        values = compared(run.config)
        step, tokens = run.records.furthest
        flops = run.flops_until(step)
        rows.append([
            str(run.folder), run.state, *(value_text(values[name]) for name in section.differing),
            f"{step:,}", f"{tokens:,}", NONE if flops is None else f"{flops:.3e}", _duration(run.records.seconds),
            *(_last(run, q) for q in columns),
            ", ".join(run.code) or NONE, ", ".join(run.versions.values()) or NONE, "; ".join(_notes(run)),
        ])  # fmt: skip
    return Table("Every run", header, rows, "The last values are those of each run's own last evaluation.")


def end_text(b: Band, quantity: Quantity | Breakdown) -> str:
    """`90.5 % (87.3 to 93.4 %)`."""
    if not b.steps:
        return b.no_end if b.runs else NONE
    mean, low, high = (value_of(series[-1], quantity.share) for series in (b.mean, b.low, b.high))
    unit = " %" if quantity.share else ""
    return f"{mean}{unit} ({low} to {high}{unit})" if b.runs > 1 else f"{mean}{unit}"


def value_of(value: float, share: bool) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{100 * value:.1f}" if share else f"{value:.4f}"


def _guesses(
    section: Section, title: str, groups: list[Group], columns: Sequence[Quantity], width: int
) -> list[list[str]]:
    """A row for each guessing line, with its values in the column of the quantity that it applies to."""
    rows = []
    for index, quantity in enumerate(columns):
        for name, levels in guessing(groups, quantity).items():
            row = [f"guessing: {name}" + (f", {title}" if title else ""), *[""] * (width - 1)]
            unit = " %" if quantity.share else ""
            row[3 + index] = ", ".join(f"{value_of(level, quantity.share)}{unit}" for level in levels)
            rows.append(row)
    return rows


def _last(run: ReadRun, quantity: Quantity) -> str:
    points = curve(run, quantity)
    if not points:
        return NONE
    step = max(points)
    earlier = "" if step == run.records.furthest[0] else f" (step {step:,})"
    return value_of(points[step], quantity.share) + (" %" if quantity.share else "") + earlier


def _notes(run: ReadRun) -> list[str]:
    return [*run.notes, *([f"FLOPs not known: {run.flops}"] if isinstance(run.flops, str) else [])]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def common_settings(section: Section) -> list[tuple[str, str]]:
    """(name, value) of the most important settings in which all runs of a section agree."""
    values = dict(settings(section.runs[0].config))
    known = {name: value_text(values[key]) for key, name in FIRST.items() if key not in section.differing}
    return list(known.items())
