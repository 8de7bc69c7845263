"""Means, spreads and breakdowns of a group, against numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.report.curves import band, breakdowns, guessing, most_passes, quantities
from sleeptrain.report.figures import (
    draw_quantity,
    draw_section,
)
from sleeptrain.report.norms_figure import draw_norms, norms
from sleeptrain.report.summary import summary
from tests.report.drawn import lines
from tests.report.made import evaluation, grid, make_run, only_section, step


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


def test_lines_belong_to_their_own_quantity(tmp_path: Path) -> None:
    found = only_section(grid(tmp_path))
    lines_of = {quantity.name: guessing(found.groups, quantity) for quantity in quantities(found)}
    assert lines_of == {
        "accuracy": {"chance": [0.5], "majority": [0.6]},
        "loss": {},
        "bits": {"majority_bits": [0.61]},
        "sampled": {"sampled": [0.52]},
    }


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


def test_the_largest_number_of_passes_is_named() -> None:
    assert most_passes({"loss": {"2": [1.0], "16": [1.0], "4": [1.0]}}) == "16"
