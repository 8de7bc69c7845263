"""The style of all figures: curves that are smoothed or thinned, and legends."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from sleeptrain.report import style
from sleeptrain.report.figures import draw_section
from sleeptrain.report.style import COLORS, DASHES, MOST_POINTS, STYLE, line_style, png, smooth, thin, wrapped
from tests.report.drawn import legend as legend_of
from tests.report.made import accuracy, make_run, only_section, step


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_a_legend_of_many_long_names_leaves_the_axes_their_size(tmp_path: Path) -> None:
    """A legend of 12 curves, whose names have several lines and an unfinished formula."""
    sized = {"S": {f"layer{n}": 1.0 for n in range(24)}, "features": {f"pass{n}": 1.0 for n in range(1, 9)}}
    for number in range(12):
        settings = [f"optim.muon_lr={number + 1}", f"run.init_from={'long/' * 60}${number}_$"]
        records = [step(1), step(2), {"step": 2, "tokens": 336, "time": 1.0, "norms": sized}, accuracy(2, 0.5)]
        make_run(tmp_path / str(number), [*settings, f"data.rule110.steps={number % 2 + 1}"], records)
    for drawn in draw_section(only_section(tmp_path)):
        with matplotlib.rc_context(STYLE):
            drawn.figure.draw_without_rendering()
        for axes in drawn.figure.axes:
            assert axes.get_window_extent().height > 1.5 * drawn.figure.dpi, drawn.name
            for legend in drawn.figure.legends:
                assert not legend.get_window_extent().overlaps(axes.get_tightbbox()), drawn.name
                assert 0 <= legend.get_window_extent().x1 <= drawn.figure.bbox.x1, drawn.name


def test_smoothing_keeps_lines_straight() -> None:
    at, line = np.arange(200), np.array([3.0 - n / 100 for n in range(200)])
    assert smooth(at, line)[1] == pytest.approx(line, abs=1e-12)
    assert list(smooth(at[:2], np.array([1.0, 5.0]))[1]) == [1.0, 5.0]
    noisy = np.array([(-1.0) ** n for n in range(400)])
    assert max(map(abs, smooth(np.arange(400), noisy)[1][10:-10])) < 0.2


def test_a_picture_of_very_many_records_shows_few_and_each_jump() -> None:
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


def test_curves_beyond_the_colors_are_dashed() -> None:
    styles = [line_style(index) for index in range(len(COLORS) * len(DASHES))]
    assert styles[0] == {"color": COLORS[0], "linestyle": "-"}
    assert styles[len(COLORS)] == {"color": COLORS[0], "linestyle": "--"}
    assert len({tuple(made.values()) for made in styles}) == len(styles)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1200, "1.2k"), (1.2e6, "1.2M"), (3e9, "3B"), (2e12, "2T")])
def test_numbers_of_an_axis_are_short(value: float, text: str) -> None:
    assert style.number(value) == text


def test_a_legend_names_each_curve_once_and_guesses_last() -> None:
    figure = Figure(figsize=(8, 4))
    left, right = figure.subplots(1, 2)
    left.axhline(0.5, color="black", label="chance")
    for axes in (left, right):
        axes.plot([1, 2], [1, 2], color="red", label="N=1")
    style.legend(figure, left, right)
    assert legend_of(figure) == ["N=1", "chance"] and figure.get_figheight() > 4


def test_without_curves_there_is_no_legend() -> None:
    figure = Figure(figsize=(8, 4))
    style.legend(figure, figure.add_subplot())
    assert figure.legends == [] and figure.get_figheight() == 4


def test_a_picture_shows_control_characters_as_text() -> None:
    figure = Figure()
    text = figure.text(0, 0, "a\x1b[31m")
    assert png(figure).startswith(b"\x89PNG") and text.get_text() == "a\\x1b[31m"
    assert wrapped("one two\x07 three", 8) == "one\ntwo\\x07\nthree"
