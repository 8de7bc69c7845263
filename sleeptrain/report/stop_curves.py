"""The figures of a calibration: the result against the mean passes, and where a rule spends its passes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleeptrain.report.style import STYLE, legend, line_style
from sleeptrain.train.calibrate import Calibration, Point

BY = "passes_by_"
AFTER_CURVES = 3  # the colors of the first panel are not used again


def draw_calibration(calibration: Calibration) -> Figure:
    """Left the result of fixed passes, of each rule and in hindsight; right the passes of each rule by difficulty."""
    spent = {rule: _spent(points) for rule, points in calibration.rules.items()}
    with matplotlib.rc_context(STYLE):
        panels = 1 + sum(bool(by_name) for by_name in spent.values())
        figure = Figure(figsize=(4.5 * panels + 1.5, 4.2), layout="constrained")
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        _curves(first, calibration)
        for axes, (rule, by_name) in zip(others, [(r, b) for r, b in spent.items() if b], strict=True):
            for index, (name, points) in enumerate(by_name.items()):
                axes.plot(*zip(*points, strict=True), marker=".", label=name, **line_style(index + AFTER_CURVES))
            axes.set_title(f"passes of {rule}")
            axes.set_xlabel("mean passes")
            axes.set_ylabel("mean passes of the rows")
        legend(figure, first, *others)
    return figure


def _curves(axes: Axes, calibration: Calibration) -> None:
    curves = {"fixed N": calibration.fixed, **calibration.rules}
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(*_line(points), marker="o" if name == "fixed N" else ".", label=name, **line_style(index))
    axes.plot(*_line(calibration.hindsight), color="black", linestyle=":", label="the best in hindsight, row by row")
    axes.set_title(f"held-out {calibration.quantity}")
    axes.set_xlabel("mean passes of windows that may sleep")
    axes.set_ylabel("accuracy" if calibration.quantity == "accuracy" else "loss, nats a token")


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
