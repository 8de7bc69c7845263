from __future__ import annotations

from sleeptrain.report.stop_curves import draw_calibrations
from sleeptrain.train.calibrate import Calibration, Curves, Point


def point(passes: float, value: float, **metrics: dict[str, float]) -> Point:
    return Point(passes, value, 0.5, metrics)


def test_each_rule_has_a_curve_and_a_panel_of_its_passes_by_difficulty() -> None:
    fixed = [point(1, 0.5), point(2, 0.8)]
    change = [
        point(2, 0.8, passes_by_steps={"t=2": 2, "t=8": 2}),
        point(1.5, 0.7, passes_by_steps={"t=2": 1, "t=8": 2}),
    ]
    judged = Curves(fixed, {"change": change, "gate": [point(1.2, 0.7)]})
    calibrated = Curves([point(1, 0.1)], {"change": [point(1, 0.1)]})
    found = Calibration("accuracy", {"judged": 1024}, calibrated, judged, [point(1, 0.5)])
    curves, spent = draw_calibrations([found]).axes
    assert curves.get_title(loc="left") == "accuracy of 1,024 judged rows"
    lines = {str(line.get_label()): line for line in curves.get_lines()}
    assert list(lines) == ["fixed N", "change", "gate", "the best in hindsight, row by row"]
    assert list(lines["change"].get_xdata()) == [1.5, 2] and list(lines["change"].get_ydata()) == [0.7, 0.8]
    assert spent.get_title(loc="left") == "passes of change"
    assert {str(line.get_label()): list(line.get_ydata()) for line in spent.get_lines()} == {
        "t=2": [1, 2],
        "t=8": [2, 2],
    }


def test_seeds_share_a_figure_and_one_label_a_curve() -> None:
    both = [Curves([point(1, value)], {"change": [point(1, value)]}) for value in (2.0, 3.0)]
    calibrations = [Calibration("loss", {"judged": 2}, curves, curves, []) for curves in both]
    [curves] = draw_calibrations(calibrations).axes
    labels = [str(line.get_label()) for line in curves.get_lines()]
    assert [label for label in labels if not label.startswith("_")] == [
        "fixed N",
        "change",
        "the best in hindsight, row by row",
    ]
    assert len(labels) == 6
