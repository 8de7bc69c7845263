"""The picture of one run."""

from __future__ import annotations

import pytest

from sleeptrain.report.records import collect
from sleeptrain.report.run_figure import draw_run, gain
from sleeptrain.report.style import png


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
    assert panels["Loss"].get_xlim()[1] > 120 * 512  # the evaluation after the last training record is inside


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
