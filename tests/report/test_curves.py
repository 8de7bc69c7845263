"""Groups, means, spreads and lines against numbers reckoned by hand, in tables and in the drawn curves."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sleeptrain.config.schema import CurriculumStage
from sleeptrain.report.curves import band, breakdowns, guessing, most_passes, quantities
from sleeptrain.report.figures import (
    draw_breakdown,
    draw_breakdown_ends,
    draw_facet_ends,
    draw_quantity,
    draw_section,
    draw_training,
)
from sleeptrain.report.groups import Section, sections, value_text
from sleeptrain.report.norms_figure import draw_norms, norms
from sleeptrain.report.page import page
from sleeptrain.report.runs import find_runs
from sleeptrain.report.style import STYLE, line_style
from sleeptrain.report.summary import summary
from sleeptrain.report.tables import tables
from tests.report.made import accuracy, evaluation, grid, make_run, step


def only_section(root: Path) -> Section:
    [found] = sections(find_runs([root])[0])
    return found


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """(x, y) of the named curves."""
    found = {str(line.get_label()): line for line in axes.get_lines()}
    named = {label: line for label, line in found.items() if not label.startswith("_")}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in named.items()}  # type: ignore[arg-type]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_seeds_are_one_group_and_passes_are_told_apart(tmp_path: Path) -> None:
    found = only_section(grid(tmp_path))
    assert [(g.name, g.label, len(g.runs)) for g in found.groups] == [("N=1", "N=1", 2), ("N=2", "N=2", 2)]
    assert found.differing == ["sleep.passes", "data.seed", "train.seed"] and found.difficulty is None
    assert [q.name for q in quantities(found)] == ["accuracy", "loss", "bits", "sampled"]


def test_settings_that_do_not_touch_the_numbers_make_no_curve(tmp_path: Path) -> None:
    make_run(tmp_path / "a", ["train.threads=1", "wandb.project=x"], [accuracy(5, 0.5)])
    make_run(tmp_path / "b", ["train.threads=2"], [accuracy(5, 0.7)])
    make_run(tmp_path / "c", ["optim.muon_lr=0.5"], [accuracy(5, 0.9)])
    found = only_section(tmp_path)
    assert [(g.name, len(g.runs)) for g in found.groups] == [("optim.muon_lr=0.002", 2), ("optim.muon_lr=0.5", 1)]
    assert {"train.threads", "wandb.project", "optim.muon_lr"} == set(found.differing)
    [every] = [table for table in tables(found) if table.title == "Every run"]
    assert {"train.threads", "wandb.project", "optim.muon_lr"} < set(every.header)


def test_runs_from_different_weights_are_no_seeds_of_one_another(tmp_path: Path) -> None:
    for name, start in (("a", "one"), ("b", "one"), ("c", "two")):
        make_run(tmp_path / name, [f"run.init_from={start}", f"train.seed={name == 'b':d}"], [accuracy(5, 0.5)])
    found = only_section(tmp_path)
    assert [(g.name, len(g.runs)) for g in found.groups] == [("run.init_from=one", 2), ("run.init_from=two", 1)]
    assert "run.init_from" in tables(found)[-1].header


def test_where_data_lies_and_what_other_data_would_have_make_no_curve(tmp_path: Path) -> None:
    for at, weight in (("here", 1), ("there", 1), ("there", 2)):
        sources = f"data.shards.sources=[{{train: {at}/a, validation: {at}/b, weight: {weight}}}]"
        text = ["experiment=stdlib", "sleep.curriculum=[]", f"data.shards.tokenizer={at}", sources]
        make_run(tmp_path / f"{at}{weight}", [*text, f"data.rule110.steps={len(at)}"], [step(1)])
    names = [group.name for group in only_section(tmp_path).groups]
    assert names == ["data.shards.sources=[default]", "data.shards.sources=[weight=2.0]"]


def test_mean_and_spread_are_those_of_the_records(tmp_path: Path) -> None:
    found = only_section(grid(tmp_path))
    accuracy_of = quantities(found)[0]
    one, two = (band(group, accuracy_of) for group in found.groups)
    assert one.steps == two.steps == [5, 10] and one.seeds == 2
    assert (one.mean, one.low, one.high) == ([pytest.approx(0.15), 0.6], [0.1, 0.5], [0.2, 0.7])
    assert (two.mean[1], two.low[1], two.high[1]) == (pytest.approx(0.85), 0.8, 0.9)
    awake = band(found.groups[1], accuracy_of, awake=True)
    assert awake.mean == [0.25, 0.25]
    flops = [find.flops_until(10) for find in found.groups[0].runs]
    assert one.flops is not None and one.flops[1] == flops[0] == flops[1] and 2 * one.flops[0] == one.flops[1]


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


def test_lines_stand_with_their_own_quantity(tmp_path: Path) -> None:
    found = only_section(grid(tmp_path))
    lines_of = {quantity.name: guessing(found.groups, quantity) for quantity in quantities(found)}
    assert lines_of == {
        "accuracy": {"chance": [0.5], "majority": [0.6]},
        "loss": {},
        "bits": {"majority_bits": [0.61]},
        "sampled": {"sampled": [0.52]},
    }


def test_a_seed_that_is_behind_shortens_the_mean_and_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [], [accuracy(5, 0.2), accuracy(10, 0.4)])
    make_run(tmp_path / "b", ["train.seed=1"], [accuracy(5, 0.4)], "failed", reason="lost")
    make_run(tmp_path / "c", ["train.seed=2"], [step(2)], "running")
    found = only_section(tmp_path)
    [group] = found.groups
    assert band(group, quantities(found)[0]).mean == [pytest.approx(0.3)]
    axes = draw_quantity(found, quantities(found)[0]).axes[0]
    assert [20.0, 40.0] in [list(line.get_ydata()) for line in axes.get_lines()]
    told = "\n".join(summary(found))
    assert "N=1: 30.0 % (20.0 to 40.0 %), 2 seeds, at step 5" in told and "equal steps" not in told
    assert "30.0 % (20.0 to 40.0 %), 2 seeds" in told and "FAILED at step 5" in told and "NOT FINISHED" in told
    every = tables(found)[-1]
    column = every.header.index("Held-out accuracy")
    assert [row[column] for row in every.rows] == ["40.0 %", "40.0 %", "–"]


def test_a_run_and_its_copy_are_one_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("copy", 0), ("b", 1)):
        make_run(tmp_path / name, [f"data.seed={seed}"], [accuracy(5, 0.5)])
    found = only_section(tmp_path)
    note = f"{tmp_path / 'a'}, {tmp_path / 'copy'} have the same seeds and count as one; the mean is over runs"
    assert found.groups[0].repeated == [note] and note in summary(found) and note in page("", [(found, [])], [])
    assert "N=1: 50.0 % (50.0 to 50.0 %), 3 runs of 2 seeds" in summary(found)
    assert tables(found)[0].rows[0][1] == "2"
    assert "N=1, mean of 3 runs of 2 seeds" in lines(draw_quantity(found, quantities(found)[0]).axes[0])


def test_runs_without_a_common_step_say_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / str(seed), [f"train.seed={seed}"], [accuracy(5 + seed, 0.5)])
    found = only_section(tmp_path)
    assert summary(found)[1] == "N=1: no step that all 2 have evaluated"
    assert tables(found)[0].rows[0][2:4] == ["–", "no step that all 2 have evaluated"]
    assert legend(draw_quantity(found, quantities(found)[0])) == ["N=1: no step that all 2 have evaluated"]


def test_last_values_over_difficulties_tell_the_seeds_and_steps_of_all(tmp_path: Path) -> None:
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


def test_what_follows_from_the_difficulty_is_in_no_label(tmp_path: Path) -> None:
    """A budget for each t is told once; where one t has two of them, it tells curves apart."""
    budgets = {4: 100, 8: 200}
    for updates, n in itertools.product(budgets, (1, 2)):
        settings = [f"data.rule110.steps={updates}", f"sleep.passes={n}", f"train.tokens={budgets[updates]}"]
        make_run(tmp_path / f"{updates}-{n}", settings, [accuracy(budgets[updates] // 10, 0.5, n)])
    assert only_section(tmp_path).labels == ["N=1", "N=2"]
    assert only_section(tmp_path).groups[0].name == "N=1, t=4"
    assert "at step" not in "\n".join(summary(only_section(tmp_path))), "each t has been evaluated to its own end"
    make_run(tmp_path / "more", [*settings[:2], "train.tokens=300"], [accuracy(10, 0.5, 2)])
    assert only_section(tmp_path).labels == ["N=1, train.tokens=100", "N=1, train.tokens=200", *(
        f"N=2, train.tokens={number}" for number in (100, 200, 300)
    )]  # fmt: skip


def depo(number: int, k1: float, k8: float) -> dict:
    by = {"accuracy_by_hops": {"k=8": k8, "k=1": k1, "k=16": 0.0}, "loss_by_hops": {"k=8": 3 - k8, "k=1": 1.0}}
    guesses = {"nodes_accuracy": 0.1, "nodes_loss": 1.6}
    return evaluation(number, {"1": [None, 1.5]}, accuracy={"1": k1}, metrics={"1": by}, guessing=guesses)


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


def test_text_has_windows_with_sleep_and_awake_and_norms(tmp_path: Path) -> None:
    for seed, more in enumerate((0.0, 0.2)):
        sized = {"S": {"layer1": 0.5}, "features": {"pass1": 2.0 + more, "pass10": 4.0, "pass2": 3.0}}
        records = [
            step(5, passes=2),
            {"step": 5, "tokens": 5, "time": 1.0, "norms": sized},
            evaluation(5, {"1": [3.0, 2.0, 4.0], "2": [3.0, 1.0 + more, 2.0]}),
        ]
        text = ["experiment=stdlib", f"train.seed={seed}", "data.sequence=384", "sleep=every", "sleep.passes=2"]
        make_run(tmp_path / str(seed), [*text, "sleep.curriculum=[]", "model.vocab_size=300"], records)
    found = only_section(tmp_path)
    [group] = found.groups
    [loss] = quantities(found)
    assert (loss.title, loss.share) == ("Held-out loss of windows 2..K", False)
    drawn = lines(draw_quantity(found, loss).axes[0])
    assert drawn["N=2, mean of 2 seeds"][1] == [pytest.approx(1.55)]
    assert drawn["N=2, kept awake (N=1), mean of 2 seeds"][1] == [3.0]
    [windows] = breakdowns(found)
    assert windows.keys == ["1", "2", "3"] and band(group, windows.of("2")).mean == [pytest.approx(1.1)]
    assert norms(group, "features") == {"pass1": {5: pytest.approx(2.1)}, "pass2": {5: 3.0}, "pass10": {5: 4.0}}
    assert list(norms(group, "features")) == ["pass1", "pass2", "pass10"]
    panels = draw_norms(found).axes
    assert {label: y for label, (_, y) in lines(panels[0]).items()} == {
        "pass 1": [pytest.approx(2.1)],
        "pass 2": [3.0],
        "pass 10": [4.0],
    }
    assert lines(panels[1])["layer 1"] == ([5], [0.5])
    assert {"norms", "loss_by_window-end", "training-loss", "loss"} == {drawn.name for drawn in draw_section(found)}
    assert "windows 2..K: N=2 1.6000, N=1 3.0000" in summary(found)


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_a_legend_of_many_long_names_leaves_the_axes_their_size(tmp_path: Path) -> None:
    """Of 12 curves with names of several lines, and an unfinished formula in each."""
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


def test_odd_numbers_are_shown_as_they_are(tmp_path: Path) -> None:
    odd = evaluation(
        5, {"1": [None, float("nan")], "4": [None, None]}, accuracy={"1": 0.0, "4": 0.0}, metrics={}, guessing={}
    )
    make_run(tmp_path / "a", ["sleep.passes=4"], [odd])
    found = only_section(tmp_path)
    cells = tables(found)[0].rows[0]
    assert cells[3:] == ["0.0 %", "–", "0.0 %", "nan"]
    assert draw_section(found)


def test_the_most_passes_are_told_by_number() -> None:
    assert most_passes({"loss": {"2": [1.0], "16": [1.0], "4": [1.0]}}) == "16"


def test_values_are_short() -> None:
    assert value_text(["a", "b"] * 3) == "3 x [a, b]" and value_text(["a", "b", "a"]) == "[a, b, a]"
    assert value_text([1, 1, 1]) == "3 x [1]" and value_text([1]) == "[1]" and value_text([]) == "[]"
    assert value_text(None) == "none" and value_text(0.5) == "0.5"
    assert (
        value_text([CurriculumStage(8, passes=4), CurriculumStage(9, window=2)])
        == "[tokens=8 passes=4, tokens=9 window=2]"
    )


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["sleep.passes=3"], "N=3"),
        (["sleep.passes=3", "sleep.sample_passes=true"], "N drawn from 1 to 3"),
        (["sleep.curriculum=[{tokens: 8, passes: 4}]"], "N by the curriculum"),
    ],
)
def test_a_single_curve_tells_its_passes(tmp_path: Path, overrides: list[str], label: str) -> None:
    make_run(tmp_path / "r", overrides, [accuracy(1, 0.5)])
    [group] = only_section(tmp_path).groups
    assert group.label == group.name == label
