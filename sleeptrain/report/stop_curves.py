"""The figures of a calibration, on its judged rows: the result against the mean passes, and the passes of a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleeptrain.report.style import STYLE, legend, line_style
from sleeptrain.train.calibrate import Calibration, Point

BY = "passes_by_"
AFTER_CURVES = 4  # the colors of the first panel are not used again


def draw_calibrations(calibrations: Sequence[Calibration]) -> Figure:
    """Left the result of fixed passes, of each rule and in hindsight; right the passes of each rule by difficulty.

    calibrations: of runs that differ in their seeds, each drawn with curves of its own.
    """
    rules = list(dict.fromkeys(rule for c in calibrations for rule in c.judged.rules))
    spent = {rule: [_spent(c.judged.rules.get(rule, [])) for c in calibrations] for rule in rules}
    spent = {rule: of_runs for rule, of_runs in spent.items() if any(of_runs)}
    with matplotlib.rc_context(STYLE):
        panels = 1 + len(spent)
        figure = Figure(figsize=(4.5 * panels + 1.5, 4.2), layout="constrained")
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        for number, calibration in enumerate(calibrations):
            _draw_curves(first, calibration, rules, labelled=number == 0)
        for axes, (rule, of_runs) in zip(others, spent.items(), strict=True):
            for number, by_name in enumerate(of_runs):
                _draw_spent(axes, by_name, labelled=number == 0)
            axes.set_title(f"passes of {rule}")
            axes.set_xlabel("mean passes of windows that may sleep")
            axes.set_ylabel("mean passes of the rows")
        legend(figure, first, *others)
    return figure


def _draw_curves(axes: Axes, calibration: Calibration, rules: Sequence[str], labelled: bool) -> None:
    judged = calibration.judged
    curves = {"fixed N": judged.fixed, **{rule: judged.rules.get(rule, []) for rule in rules}}
    for index, (name, points) in enumerate(curves.items()):
        marker = "o" if name == "fixed N" else "."
        axes.plot(*_line(points), marker=marker, label=name if labelled else None, **line_style(index))
    bound = "the best in hindsight, row by row" if labelled else None
    axes.plot(*_line(calibration.hindsight), color="black", linestyle=":", label=bound)
    axes.set_title(f"{calibration.quantity} of {calibration.rows['judged']:,} judged rows")
    axes.set_xlabel("mean passes of windows that may sleep")
    axes.set_ylabel("accuracy" if calibration.quantity == "accuracy" else "loss, nats a token")


def _draw_spent(axes: Axes, by_name: Mapping[str, Sequence[tuple[float, float]]], labelled: bool) -> None:
    for index, (name, points) in enumerate(by_name.items()):
        label = name if labelled else None
        axes.plot(*zip(*points, strict=True), marker=".", label=label, **line_style(index + AFTER_CURVES))


def _line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    ordered = sorted(points, key=lambda point: point.passes)
    return [point.passes for point in ordered], [point.value for point in ordered]


def _spent(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """{difficulty: [(mean passes of all, mean passes of its rows)]}, empty if the task has no metric by difficulty."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(points, key=lambda point: point.passes):
        for metric, values in (point.metrics or {}).items():
            if metric.startswith(BY):
                for name, passes in values.items():
                    by_name.setdefault(name, []).append((point.passes, passes))
    return by_name
