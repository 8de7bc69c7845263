"""The lines that a report prints for each task."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.report.curves import band, quantities
from sleeptrain.report.figures import draw_quantity
from sleeptrain.report.summary import summary
from sleeptrain.report.tables import tables
from tests.report.drawn import legend
from tests.report.made import accuracy, make_run, only_section, step


def test_a_seed_with_fewer_steps_shortens_the_mean_and_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [], [accuracy(5, 0.2), accuracy(10, 0.4)])
    make_run(tmp_path / "b", ["train.seed=1"], [accuracy(5, 0.4)], "failed", reason="lost")
    make_run(tmp_path / "c", ["train.seed=2"], [step(2)], "running")
    found = only_section(tmp_path)
    [group] = found.groups
    assert band(group, quantities(found)[0]).mean == [pytest.approx(0.3)]
    axes = draw_quantity(found, quantities(found)[0]).axes[0]
    assert [20.0, 40.0] in [list(line.get_ydata()) for line in axes.get_lines()]
    text = "\n".join(summary(found))
    assert "N=1: 30.0 % (20.0 to 40.0 %), 2 seeds, at step 5" in text and "equal steps" not in text
    assert "30.0 % (20.0 to 40.0 %), 2 seeds" in text and "FAILED at step 5" in text and "NOT FINISHED" in text
    every = tables(found)[-1]
    column = every.header.index("Held-out accuracy")
    assert [row[column] for row in every.rows] == ["40.0 %", "40.0 %", "–"]


def test_runs_without_a_common_step_say_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / str(seed), [f"train.seed={seed}"], [accuracy(5 + seed, 0.5)])
    found = only_section(tmp_path)
    assert summary(found)[1] == "N=1: no step that all 2 have evaluated"
    assert tables(found)[0].rows[0][2:4] == ["–", "no step that all 2 have evaluated"]
    assert legend(draw_quantity(found, quantities(found)[0])) == ["N=1: no step that all 2 have evaluated"]
