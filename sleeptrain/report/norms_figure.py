"""The sizes of features by pass and of memory by layer over the steps: what grows first where a loop gets unstable."""

from __future__ import annotations

import math
import re
import statistics

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleeptrain.report.groups import Group, Section
from sleeptrain.report.style import STYLE, line_style, over

KINDS = {"features": "features", "S": "fast weights S"}


def draw_norms(section: Section) -> Figure:
    """A row of panels for each group that has records of norms: left features by pass, right S by layer."""
    groups = [group for group in section.groups if any(run.norms for run in group.runs)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1 + 2.6 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), 2, squeeze=False, sharex=True)
        for group, pair in zip(groups, panels, strict=True):
            for axes, (kind, title) in zip(pair, KINDS.items(), strict=True):
                _panel(axes, norms(group, kind))
                axes.set_title(f"{group.name}: {title}", fontsize=9)
            pair[0].set_ylabel("root mean square")
        for axes in panels[-1]:
            axes.set_xlabel("steps")
    return figure


def norms(group: Group, kind: str) -> dict[str, dict[int, float]]:
    """{"pass1": {step: mean over the runs that have a record there}}; kind: `features` or `S`."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in group.runs:
        for record in run.norms:
            for name, value in record["norms"][kind].items():
                found.setdefault(name, {}).setdefault(record["step"], []).append(value)
    ordered = sorted(found, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    return {name: {step: statistics.fmean(v) for step, v in sorted(found[name].items())} for name in ordered}


def _panel(axes: Axes, curves: dict[str, dict[int, float]]) -> None:
    for index, (name, values) in enumerate(curves.items()):
        label = re.sub(r"(\d+)", r" \1", name)
        marker = "o" if len(values) <= 30 else None
        axes.plot(list(values), list(values.values()), marker=marker, markersize=3, label=label, **line_style(index))
    finite = [value for values in curves.values() for value in values.values() if math.isfinite(value)]
    axes.set_ylim(0, 1.2 * max(finite, default=0) or 1)
    over(axes)
    if curves:
        axes.legend(loc="best", ncols=2 if len(curves) > 6 else 1)
