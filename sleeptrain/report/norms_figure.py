"""The sizes of features by pass, and of memory by layer, over steps. They grow first if a loop becomes unstable."""

from __future__ import annotations

import math
import re
import statistics

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleeptrain.report.groups import Group, Section
from sleeptrain.report.style import LINE, STYLE, legend, line_style, over, wrapped

KINDS = {"features": "root mean square of features", "S": "root mean square of S"}


def draw_norms(section: Section) -> Figure:
    """A row of panels for each group with records of norms: left features by pass, right S by layer."""
    groups = [group for group in section.groups if any(run.records.norms for run in group.runs)]
    with matplotlib.rc_context(STYLE):
        titles = [wrapped(group.name, 120) for group in groups]
        height = 1 + 2.6 * len(groups) + LINE * sum(title.count("\n") for title in titles)
        figure = Figure(figsize=(11, height), layout="constrained")
        panels = figure.subplots(len(groups), 2, squeeze=False, sharex=True)
        for column, (kind, y_label) in enumerate(KINDS.items()):
            curves = [norms(group, kind) for group in groups]
            names = sorted({name for by_name in curves for name in by_name}, key=_numbers)
            for axes, by_name in zip(panels[:, column], curves, strict=True):
                _panel(axes, by_name, names)
                axes.set_ylabel(y_label)
            panels[-1, column].set_xlabel("steps")
        for axes, title in zip(panels[:, 0], titles, strict=True):
            axes.set_title(title, fontsize=9)
        legend(figure, *panels.T.flat)
    return figure


def norms(group: Group, kind: str) -> dict[str, dict[int, float]]:
    """{"pass1": {step: mean over the runs with a record at this step}}. kind: `features` or `S`."""
    values_at: dict[str, dict[int, list[float]]] = {}
    for run in group.runs:
        for record in run.records.norms:
            for name, value in record["norms"][kind].items():
                values_at.setdefault(name, {}).setdefault(record["step"], []).append(value)
    return {
        name: {step: statistics.fmean(v) for step, v in sorted(values_at[name].items())}
        for name in sorted(values_at, key=_numbers)
    }


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _panel(axes: Axes, curves: dict[str, dict[int, float]], names: list[str]) -> None:
    """Draw the curves of one group. names: of the curves of all panels, in the order of their colors."""
    for name, values in curves.items():
        label = re.sub(r"(\d+)", r" \1", name)
        marker, style = "o" if len(values) <= 30 else None, line_style(names.index(name))
        axes.plot(list(values), list(values.values()), marker=marker, markersize=3, label=label, **style)
    finite = [value for values in curves.values() for value in values.values() if math.isfinite(value)]
    axes.set_ylim(0, 1.2 * max(finite, default=0) or 1)
    over(axes)
