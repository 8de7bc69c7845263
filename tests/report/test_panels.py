"""The panels of a page: the curves of the figure, their places, and colors for light and dark."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from sleeptrain.report.curves import breakdowns, quantities
from sleeptrain.report.figures import draw_breakdown_ends, draw_quantity
from sleeptrain.report.panels import POINTS, Key, keys, panels
from sleeptrain.report.records import collect
from sleeptrain.report.run_figure import draw_run_panels
from sleeptrain.report.style import MOST_POINTS
from tests.report.made import evaluation, grid_runs, read_run, section_of, step

TEXT = ("experiment=stdlib", "sleep.curriculum=[]", "data.sequence=256", "model.vocab_size=300", "sleep.passes=2")


def test_the_points_are_those_of_the_curves_and_each_seed_has_its_name() -> None:
    section = section_of(*(read_run(*run) for run in grid_runs()))
    figure = draw_quantity(section, quantities(section)[0])
    by_steps, by_flops = panels(figure)
    curves = {name: (x, y, unit) for name, x, y, unit, _ in by_steps.data["curves"]}
    assert curves["N=2, mean of 2 seeds"] == ([5, 10], [35, 85], "%")
    assert curves["N=1, seed 1"] == ([5, 10], [20, 70], "%")
    assert len(curves) == 6 and (by_steps.data["x"], by_flops.data["x"]) == ("steps", "training FLOPs")
    assert curves.keys() == {curve[0] for curve in by_flops.data["curves"]}


def test_a_point_is_where_the_curve_is_drawn() -> None:
    """The script computes places from the box of the axes; the path of the SVG has them too."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes in figure.subplots(1, 2):
        axes.plot([0, 1, 4], [2.0, 8.0, 3.0], color="#123456", label="a")
    [_, panel] = panels(figure)
    [[name, x, y, _, (left, top, right, bottom, x0, x1, y0, y1)]] = panel.data["curves"]
    across, up = (right - left) / (x1 - x0), (bottom - top) / (y1 - y0)
    places = [(left + across * (a - x0), bottom - up * (b - y0)) for a, b in zip(x, y, strict=True)]
    svg = ElementTree.fromstring(panel.svg)
    [path] = [p for p in svg.iter("path") if "stroke: #123456" in p.get("style", "")]
    numbers = [float(word) for word in str(path.get("d")).split() if word not in "ML"]
    assert name == "a" and numbers == pytest.approx([value for place in places for value in place], abs=0.02)
    view_left, view_top, width, height = map(float, str(svg.get("viewBox")).split())
    assert view_left < left < right <= view_left + width and view_top < top < bottom < view_top + height
    assert width == panel.width < 11 * 72 / 2 + 20


def test_colors_are_those_of_the_page_and_titles_and_legends_are_text() -> None:
    figure = Figure(figsize=(8, 4))
    axes = figure.add_subplot()
    axes.plot([1, 2], [1, 2], "o", color="#d1603d", label="points")
    axes.axhline(1.5, color="black", linestyle=":", label="chance")
    axes.plot([1, 2], [1, float("nan")], color="#1b6ca8", label="N=4 <&\x1b")
    axes.set_title("A title", loc="left")
    axes.legend()
    [panel] = panels(figure)
    assert panel.title == "A title" and "A title" not in panel.svg and "N=4" not in panel.svg
    assert "#d1603d" not in panel.svg and "stroke: var(--c3)" in panel.svg and "var(--guess)" in panel.svg
    expected = [("points", "var(--c0)", None), ("N=4 <&\x1b", "var(--c3)", ""), ("chance", "var(--guess)", "2 2")]
    assert panel.keys == keys([axes]) == [Key(*key) for key in expected]
    assert [curve[:3] for curve in panel.data["curves"]] == [["points", [1, 2], [1, 2]], ["N=4 <&\x1b", [1], [1]]]


def test_axes_of_one_place_are_one_panel_and_shared_labels_are_repeated() -> None:
    made = panels(draw_run_panels(collect([step(n, 3 - n / 100, passes=1 + n // 5) for n in range(1, 10)])))
    assert [panel.title for panel in made] == [
        "Loss",
        "Curriculum",
        "Held-out loss of windows 2..K",
        "Each window, last evaluation",
    ]
    assert [curve[0] for curve in made[1].data["curves"]] == ["passes N", "window L"]
    assert made[0].data["x"] == made[1].data["x"] == "wake tokens seen"


def test_long_curves_keep_their_spikes_and_names_of_keys_replace_numbers() -> None:
    figure = Figure()
    y = [0.0] * MOST_POINTS
    y[777] = 5.0
    figure.add_subplot().plot(range(MOST_POINTS), y, label="a")
    [[_, x, values, *_]] = panels(figure)[0].data["curves"]
    assert len(x) <= POINTS and x[values.index(5)] == 777
    section = section_of(read_run({}, [evaluation(5, {"1": [3.0, 2.5], "2": [3.0, 2.0]})], base=TEXT))
    [panel] = panels(draw_breakdown_ends(section, breakdowns(section)[0]))
    assert panel.data["names"] == {"0": "1", "1": "2"}
    assert [curve[:3] for curve in panel.data["curves"]] == [
        ["N=2", [0, 1], [3, 2]],
        ["N=2, kept awake (N=1)", [0, 1], [3, 2.5]],
    ]
