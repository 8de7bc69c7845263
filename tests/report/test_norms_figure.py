"""The sizes of features and memory, as means over runs and as they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleeptrain.report.norms_figure import draw_norms, norms
from tests.report.drawn import lines
from tests.report.made import make_run, only_section, step


def sizes(number: int, features: dict[str, float], memory: dict[str, float]) -> dict[str, Any]:
    return step(number) | {"norms": {"features": features, "S": memory}}


def test_means_are_over_the_runs_that_have_a_record_at_a_step(tmp_path: Path) -> None:
    first = [sizes(10, {"pass10": 1.0, "pass2": 2.0}, {"layer3": 0.5}), sizes(20, {"pass2": 6.0}, {})]
    make_run(tmp_path / "a", [], first)
    make_run(tmp_path / "b", ["train.seed=1"], [sizes(10, {"pass2": 4.0}, {"layer3": 1.5})])
    [group] = only_section(tmp_path).groups
    assert norms(group, "features") == {"pass2": {10: 3.0, 20: 6.0}, "pass10": {10: 1.0}}
    assert list(norms(group, "features")) == ["pass2", "pass10"], "by their numbers, not as text"
    assert norms(group, "S") == {"layer3": {10: 1.0}}


def test_each_group_that_has_them_is_a_row(tmp_path: Path) -> None:
    for n in (1, 2):
        records = [sizes(10, {f"pass{p}": 2.0 * p for p in range(1, n + 1)}, {"layer0": 0.5 * n})]
        make_run(tmp_path / str(n), [f"sleep.passes={n}"], records)
    make_run(tmp_path / "3", ["sleep.passes=3"], [step(10)])
    axes = draw_norms(only_section(tmp_path)).axes
    assert [panel.get_title(loc="left") for panel in axes] == ["N=1", "", "N=2", ""]
    assert lines(axes[2]) == {"pass 1": ([10], [2.0]), "pass 2": ([10], [4.0])}
    assert lines(axes[3]) == {"layer 0": ([10], [1.0])}
    colors = [axes[row].get_lines()[0].get_color() for row in (0, 2)]
    assert colors[0] == colors[1], "of the same pass in all rows"


def test_a_size_that_is_not_finite_does_not_set_the_axis(tmp_path: Path) -> None:
    make_run(
        tmp_path / "a", [], [sizes(1, {"pass1": 5.0}, {"layer0": float("nan")}), sizes(2, {"pass1": float("inf")}, {})]
    )
    left, right = draw_norms(only_section(tmp_path)).axes
    assert left.get_ylim() == (0, 6.0) and right.get_ylim() == (0, 1)
