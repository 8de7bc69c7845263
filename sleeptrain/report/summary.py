"""The lines that a report prints for each task."""

from __future__ import annotations

from itertools import pairwise

from sleeptrain.report.curves import Quantity, band, counted, ends_early, quantities
from sleeptrain.report.groups import Group, Section
from sleeptrain.report.run_figure import gain
from sleeptrain.report.runs import ReadRun
from sleeptrain.report.tables import end_text


def summary(section: Section) -> list[str]:
    """Last accuracy of each group and the distance between groups; for text the loss with and without sleep.

    The last lines name the runs that are not finished.
    """
    accuracy = next((q for q in quantities(section) if q.name == "accuracy"), None)
    if accuracy is None:
        lines = [line for run in section.runs for line in _loss(run)]
    else:
        lines = [line for title, groups in section.facets for line in _accuracy(section, title, groups, accuracy)]
    not_finished = [run for run in section.runs if not run.finished]
    return [
        f"{section.title}, {_count(len(section.runs), 'run')}",
        *lines,
        *(note for group in section.groups for note in group.repeated),
        *(f"{run.folder}: {run.state}" for run in not_finished),
    ]


def _accuracy(section: Section, title: str, groups: list[Group], accuracy: Quantity) -> list[str]:
    bands = [(group, band(group, accuracy)) for group in groups]
    lines = [
        f"{group.name}: {end_text(b, accuracy)}"
        + (f", {counted([b])}" if b.steps and b.runs > 1 else "")
        + (f", at step {b.end:,}" if ends_early(section, group, b) else "")
        for group, b in bands
    ]
    known = [(group, b) for group, b in bands if b.steps]
    if len(known) > 1 and all(b.steps[-1] == a.steps[-1] for (_, a), (_, b) in pairwise(known)):
        (few, first), (many, last) = known[0], known[-1]
        points = 100 * (last.mean[-1] - first.mean[-1])
        place = "behind" if points < 0 else "ahead of"
        line = f"{many.label} is {abs(points):.1f} points {place} {few.label} at equal steps"
        lines.append(line + (title and f", {title}"))
    return lines


def _loss(run: ReadRun) -> list[str]:
    """Last training loss, and loss of windows 2..K with and without sleep."""
    records = run.records
    if not records.num_steps:
        return [f"{run.config.run.name}: no training record yet"]
    loss, step, tokens = (records.columns[name][-1] for name in ("loss", "step", "tokens"))
    line = f"{run.config.run.name}: loss {loss:.4f} at step {step}, {tokens:,} tokens"
    most, asleep, awake = gain(run.evaluations[-1]) if run.evaluations else (1, None, None)
    values = [f"N={n} {value:.4f}" for n, value in ((most, asleep), (1, awake)) if value is not None]
    lines = [line, f"windows 2..K: {', '.join(values) or 'not evaluated'}"]
    if asleep is not None and awake is not None:
        relative = f" (relative {100 * (asleep - awake) / awake:+.2f} %)" if awake else ""
        lines.append(f"with sleep: {abs(awake - asleep):.4f} {'HIGHER' if asleep > awake else 'lower'}{relative}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
