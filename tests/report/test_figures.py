"""The curves that are drawn, against numbers computed by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sleeptrain.report.curves import breakdowns, quantities
from sleeptrain.report.figures import (
    draw_breakdown,
    draw_breakdown_ends,
    draw_facet_ends,
    draw_quantity,
    draw_training,
)
from sleeptrain.report.groups import sections
from sleeptrain.report.runs import find_runs
from sleeptrain.report.style import line_style
from sleeptrain.report.summary import summary
from sleeptrain.report.tables import tables
from tests.report.drawn import legend, lines
from tests.report.made import accuracy, evaluation, grid, make_run, only_section, step


def test_the_curves_drawn_are_the_means_over_steps_and_over_flops(tmp_path: Path) -> None:
    found = only_section(grid(tmp_path))
    figure = draw_quantity(found, quantities(found)[0])
    by_steps, by_flops = figure.axes
    assert (by_steps.get_xlabel(), by_flops.get_xlabel()) == ("steps", "training FLOPs")
    assert lines(by_steps)["N=1, mean of 2 seeds"] == ([5, 10], pytest.approx([15, 60]))
    assert lines(by_steps)["N=2, mean of 2 seeds"] == ([5, 10], pytest.approx([35, 85]))
    costs = [[run.flops_until(step) for step in (5, 10)] for run in (found.runs[0], found.runs[-1])]
    assert lines(by_flops)["N=1, mean of 2 seeds"] == (costs[0], pytest.approx([15, 60]))
    assert lines(by_flops)["N=2, mean of 2 seeds"][0] == costs[1] and costs[1][0] > costs[0][0]
    thin = [list(line.get_ydata()) for line in by_steps.get_lines() if line.get_linewidth() == 0.8]
    assert thin == [pytest.approx(y) for y in ([10, 50], [20, 70], [30, 80], [40, 90])]
    thin = [list(line.get_xdata()) for line in by_flops.get_lines() if line.get_linewidth() == 0.8]
    assert thin == [costs[0], costs[0], costs[1], costs[1]]
    lows = [sorted(set(shade.get_paths()[0].vertices[:, 1].round(6))) for shade in by_steps.collections]
    assert lows == [[10, 20, 50, 70], [30, 40, 80, 90]]
    levels = {label: y[0] for label, (_, y) in lines(by_steps).items() if len(set(y)) == 1}
    assert levels == {"chance": 50, "always the likelier label": 60}
    assert set(legend(figure)) == set(lines(by_steps))


def test_last_values_over_difficulties_name_the_seeds_and_steps_of_all(tmp_path: Path) -> None:
    for t, n, seed, end in ((4, 1, 0, 10), (4, 1, 1, 10), (4, 2, 0, 10), (8, 1, 0, 5), (8, 2, 0, 10), (8, 2, 1, 10)):
        settings = [f"data.rule110.steps={t}", f"sleep.passes={n}", f"train.seed={seed}"]
        make_run(tmp_path / f"{t}-{n}-{seed}", settings, [accuracy(end, 0.5, n)])
    found = only_section(tmp_path)
    [axes] = draw_facet_ends(found, quantities(found)[0]).axes
    labels = [str(bar.get_label()) for bar in axes.containers]
    assert labels == ["N=1, at steps 5 to 10, mean of 1 to 2 seeds", "N=2, mean of 1 to 2 seeds"]


def test_difficulties_of_rule110_have_panels(tmp_path: Path) -> None:
    for t, guess in ((4, 0.6), (8, 0.7)):
        for n in (1, 2):
            end = accuracy(10, 0.1 * t * n / 2, n, chance=0.5, majority=guess)
            make_run(tmp_path / f"t{t}n{n}", [f"data.rule110.steps={t}", f"sleep.passes={n}"], [end])
    found = only_section(tmp_path)
    assert [title for title, _ in found.facets] == ["t=4", "t=8"] and found.labels == ["N=1", "N=2"]
    figure = draw_quantity(found, quantities(found)[0])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["t=4", "t=4", "t=8", "t=8"]
    assert lines(figure.axes[0])["N=2"] == ([10], pytest.approx([40]))
    assert lines(figure.axes[2])["N=1"] == ([10], pytest.approx([40]))
    assert lines(figure.axes[2])["always the likelier label"][1][0] == 70
    [axes] = draw_facet_ends(found, quantities(found)[0]).axes
    bars = {str(bar.get_label()): bar.lines[0] for bar in axes.containers}  # type: ignore[attr-defined]
    assert {label: list(line.get_ydata()) for label, line in bars.items()} == {
        "N=1": pytest.approx([20, 40]),
        "N=2": pytest.approx([40, 80]),
    }
    assert lines(axes)["always the likelier label"] == ([4, 8], [60, 70])
    ends = tables(found)[0]
    assert [row[3] for row in ends.rows if row[0] == "guessing: majority, t=8"] == ["70.0 %"]
    assert "N=2 is 40.0 points ahead of N=1 at equal steps, t=8" in summary(found)


def depo(number: int, k1: float, k8: float) -> dict:
    by = {"accuracy_by_hops": {"k=8": k8, "k=1": k1, "k=16": 0.0}, "loss_by_hops": {"k=8": 3 - k8, "k=1": 1.0}}
    guesses = {"nodes_accuracy": 0.1, "nodes_loss": 1.6}
    return evaluation(number, {"1": [None, 1.5]}, accuracy={"1": k1}, metrics={"1": by}, guessing=guesses)


@pytest.mark.slow
def test_hops_have_panels_in_their_order(tmp_path: Path) -> None:
    for seed, gain in enumerate((0.0, 0.2)):
        records = [depo(5, 0.2, 0.1), depo(10, 0.8, 0.4 + gain)]
        make_run(tmp_path / str(seed), ["experiment=depo_small", f"train.seed={seed}"], records)
    found = only_section(tmp_path)
    by_accuracy, by_loss = breakdowns(found)
    assert (by_accuracy.by, by_accuracy.keys) == ("hops", ["k=1", "k=8", "k=16"])
    assert (by_loss.title, by_loss.unit, by_loss.share) == ("Held-out loss by hops", "nats a target", False)
    figure = draw_breakdown(found, by_accuracy)
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == ["k=1", "k=8", "k=16"]
    assert lines(figure.axes[2])["N=1, mean of 2 seeds"] == ([5, 10], pytest.approx([10, 50]))
    [axes] = draw_breakdown_ends(found, by_accuracy).axes
    [bar] = axes.containers
    assert list(bar.lines[0].get_ydata()) == pytest.approx([80, 50, 0])  # type: ignore[attr-defined]
    [_, table, losses, _] = tables(found)
    assert table.rows == [["N=1", "80.0 % (80.0 to 80.0 %)", "50.0 % (40.0 to 60.0 %)", "0.0 % (0.0 to 0.0 %)"]]
    assert losses.rows[0][1:] == ["1.0000 (1.0000 to 1.0000)", "2.5000 (2.4000 to 2.6000)"]
    for figure, level in (
        (draw_quantity(found, quantities(found)[1]), 1.6),
        (draw_breakdown(found, by_loss), 1.6),
        (draw_breakdown(found, by_accuracy), 10),
    ):
        assert all(lines(axes)["knows the nodes and no edge"][1][0] == level for axes in figure.axes)


@pytest.mark.slow
def test_a_label_has_one_color_on_a_page(tmp_path: Path) -> None:
    for t, n in itertools.product((4, 8), (1, 2)):
        make_run(tmp_path / f"{t}{n}", [f"data.rule110.steps={t}", f"sleep.passes={n}"], [step(1), accuracy(1, 0.5, n)])
    for n in (2, 4):
        records = [step(1), evaluation(1, {"1": [None, 1.5]}, accuracy={"1": 0.5})]
        make_run(tmp_path / f"depo{n}", ["experiment=depo_small", f"sleep.passes={n}"], records)
    found = sections(find_runs([tmp_path])[0])
    assert [section.colors for section in found] == [{"N=1": 1, "N=2": 0}, {"N=2": 0, "N=4": 1}]
    for section in found:
        figures = [draw_training(section), draw_quantity(section, quantities(section)[0])]
        drawn = [line for figure in figures for axes in figure.axes for line in axes.get_lines()]
        labels = [label for label in section.labels for line in drawn if line.get_label() == label]
        assert len(labels) == 3 * len(section.groups)
        for line in drawn:
            assert line.get_color() == line_style(section.colors[str(line.get_label())])["color"]


def test_the_training_loss_is_that_of_the_records(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [], [step(n, float("nan") if n == 3 else 5.0 - n) for n in (1, 2, 3, 4)])
    [axes] = draw_training(only_section(tmp_path)).axes
    [line] = axes.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 4], [4.0, 3.0, 1.0])
