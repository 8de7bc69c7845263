"""The picture of one run."""

from __future__ import annotations

import numpy as np
import pytest

from sleeptrain.report.records import collect
from sleeptrain.report.run_figure import draw_run, gain
from sleeptrain.report.style import MOST_POINTS, png, smooth, thin


def step(number: int, loss: float, passes: int = 1, window: int = 64) -> dict:
    shape = {"passes": passes, "window": window, "batch": 2}
    return {"step": number, "tokens": number * 512, "loss": loss, "time": 0.0} | shape


def evaluation(number: int, accuracy: bool = False, **losses: list) -> dict:
    found: dict = {"loss": {name.removeprefix("n"): values for name, values in losses.items()}}
    if accuracy:
        found["accuracy"] = {n: 0.5 for n in found["loss"]}
    return {"step": number, "tokens": number * 512, "eval": found, "time": 0.0}


STEPS = [step(n, 3 - n / 100, passes=1 if n < 50 else 4, window=64 if n < 20 else 128) for n in range(1, 100)]
EVALUATIONS = [
    evaluation(40, n1=[3.0, 2.5, 2.5]),
    evaluation(60, n1=[3.0, 2.5, 2.5], n2=[3.0, 2.4, 2.4], n4=[3.0, 2.25, 2.25]),
    evaluation(120, n1=[3.0, 2.0, 2.0], n4=[3.0, 1.5, 1.75]),
]


def test_the_curves_are_the_records() -> None:
    figure = draw_run("night", collect([*STEPS, *EVALUATIONS]))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    curves = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert set(panels) >= {"Loss", "Curriculum", "Held-out loss of windows 2..K", "Each window, last evaluation"}
    assert list(curves["training, each record"].get_ydata()) == [3 - n / 100 for n in range(1, 100)]
    assert list(curves["held out, all windows"].get_ydata()) == pytest.approx([8 / 3, 2.5, 6.25 / 3])
    asleep = curves["with sleep (N=4)"]
    assert list(asleep.get_xdata()) == [60 * 512, 120 * 512] and list(asleep.get_ydata()) == [2.25, 1.625]
    assert list(curves["without sleep (N=1)"].get_ydata()) == [2.5, 2.5, 2.0]
    assert list(curves["N=4"].get_ydata()) == [3.0, 1.5, 1.75]
    (passes,) = panels["Curriculum"].get_lines()
    assert passes.get_drawstyle() == "steps-pre" and sorted(set(passes.get_ydata())) == [1, 4]
    assert panels["Loss"].get_xlim()[1] > 120 * 512  # the evaluation behind the last training record is inside


@pytest.mark.parametrize(
    ("steps", "evaluations", "gained"),
    [
        ([step(1, 2.0)], [], None),
        ([step(1, 2.0)], [evaluation(1, n1=[2.0])], (1, None, 2.0)),
        ([step(1, float("nan"))], [evaluation(1, n1=[2.0, 1.0], n2=[2.0, 1.25])], (2, 1.25, 1.0)),
        ([step(1, 2.0)], [evaluation(1, True, n1=[None, 2.0], n3=[None, 1.0])], (3, 1.0, 2.0)),
        ([step(1, 2.0)], [evaluation(1, n1=[2.0, None])], (1, None, None)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_little_or_odd_data(steps: list, evaluations: list, gained: tuple | None) -> None:
    assert png(draw_run("night", collect([*steps, *evaluations]))).startswith(b"\x89PNG")
    assert gained is None or gain(evaluations[-1]) == gained


def test_smoothing_keeps_lines_straight() -> None:
    at, line = np.arange(200), np.array([3.0 - n / 100 for n in range(200)])
    assert smooth(at, line)[1] == pytest.approx(line, abs=1e-12)
    assert list(smooth(at[:2], np.array([1.0, 5.0]))[1]) == [1.0, 5.0]
    noisy = np.array([(-1.0) ** n for n in range(400)])
    assert max(map(abs, smooth(np.arange(400), noisy)[1][10:-10])) < 0.2


def test_of_very_many_records_a_picture_shows_few_and_each_leap() -> None:
    count = 100_000
    x, y = np.arange(count), np.linspace(3.0, 1.0, count)
    y[77_777], y[33_333] = 9.0, -9.0
    shown_x, shown_y = thin(x, y)
    assert len(shown_x) <= MOST_POINTS and list(shown_x) == sorted(shown_x) and list(y[shown_x]) == list(shown_y)
    assert shown_x[shown_y.argmax()] == 77_777 and shown_x[shown_y.argmin()] == 33_333
    assert (shown_x[0], shown_x[-1]) == (0, count - 1)
    smooth_x, smooth_y = smooth(x, y)
    assert len(smooth_x) <= MOST_POINTS and (smooth_x[0], smooth_x[-1]) == (0, count - 1)
    assert smooth_y == pytest.approx(np.linspace(3.0, 1.0, count)[smooth_x], abs=0.01)
