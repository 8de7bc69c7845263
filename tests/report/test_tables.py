"""The tables of a page, as rows of text."""

from __future__ import annotations

from pathlib import Path

from sleeptrain.report.curves import band, quantities
from sleeptrain.report.figures import draw_section
from sleeptrain.report.tables import common_settings, end_text, tables, value_of
from tests.report.made import evaluation, grid, make_run, only_section, step


def test_odd_numbers_are_shown_as_they_are(tmp_path: Path) -> None:
    odd = evaluation(
        5, {"1": [None, float("nan")], "4": [None, None]}, accuracy={"1": 0.0, "4": 0.0}, metrics={}, guessing={}
    )
    make_run(tmp_path / "a", ["sleep.passes=4"], [odd])
    found = only_section(tmp_path)
    cells = tables(found)[0].rows[0]
    assert cells[3:] == ["0.0 %", "–", "0.0 %", "nan"]
    assert draw_section(found)


def test_an_end_is_a_mean_and_its_spread_where_several_runs_have_it(tmp_path: Path) -> None:
    section = only_section(grid(tmp_path))
    share, loss = quantities(section)[:2]
    two = band(section.groups[1], share)
    assert end_text(two, share) == "85.0 % (80.0 to 90.0 %)"
    assert end_text(band(section.groups[1], loss), loss) == "1.1500 (1.1000 to 1.2000)"
    assert [value_of(0.123456, share) for share in (True, False)] == ["12.3", "0.1235"]
    assert value_of(float("inf"), True) == "inf"


def test_runs_without_an_evaluation_have_one_table(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [], [step(1)])
    [every] = tables(only_section(tmp_path))
    assert every.title == "Every run" and len(every.rows) == 1
    assert dict(zip(every.header, every.rows[0], strict=True))["steps"] == "1"


def test_settings_that_all_runs_share_are_named_once(tmp_path: Path) -> None:
    shared = dict(common_settings(only_section(grid(tmp_path))))
    assert shared["L"] == "20" and shared["tokens"] == "1680" and "N" not in shared
