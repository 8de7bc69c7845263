"""The work folder: the work that is kept after a kill, and the moment when the result gets its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.errors import DataError
from sleeptrain.prepare.work import Work, changes

PLAN: dict[str, Any] = {"settings": {"share": 1}, "inputs": [["a", 1], ["b", 1]], "units": []}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    """A work folder with a lock and PLAN."""
    work = Work(tmp_path / "out")
    with work.locked():
        assert not work.tidy(PLAN, False)
        work.begin(PLAN)
        yield work


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_work_folder_is_next_to_the_target(tmp_path: Path, work: Work) -> None:
    assert work.path == tmp_path / ".out.work" and names(tmp_path) == {".out.work"}
    assert names(work.path) == {"lease.json", "plan.json", "units"}


def test_the_same_plan_goes_on_without_partial_units(work: Work) -> None:
    (work.units / "000000").mkdir()
    (work.units / ".000001.part").mkdir()
    (work.path / ".plan.part").touch()
    assert not work.tidy(PLAN, False)
    assert names(work.units) == {"000000"} and names(work.path) == {"lease.json", "plan.json", "units"}


def test_another_plan_is_refused_with_the_differences_or_forced(work: Work) -> None:
    other = PLAN | {"settings": {"share": 2}, "inputs": [["a", 2], ["c", 1]]}
    with pytest.raises(DataError, match=r"\(share 1, now 2; a changed; b gone; c new\); repeat that call"):
        work.tidy(other, False)
    assert not work.tidy(other, True)
    assert names(work.path) == {"lease.json"}


def test_the_first_of_many_differences_are_named(work: Work) -> None:
    with pytest.raises(DataError, match=r"a changed; b changed; n0 new; n1 new; n2 new; 4 more\)"):
        work.tidy(PLAN | {"inputs": [[name, 2] for name in ("a", "b", *(f"n{i}" for i in range(7)))]}, False)


def test_a_damaged_plan_is_refused_or_forced(work: Work) -> None:
    (work.path / "plan.json").write_text("[]")
    with pytest.raises(DataError, match=r"plan\.json .*; drop the work so far with --force"):
        work.tidy(PLAN, False)
    work.tidy(PLAN, True)
    assert names(work.path) == {"lease.json"}


def test_a_result_is_published_and_the_work_removed(tmp_path: Path, work: Work) -> None:
    work.result.mkdir()
    (work.result / "made").touch()
    work.out.mkdir()
    work.publish(replace=False)
    assert names(work.out) == {"made"}
    work.remove()
    assert names(tmp_path) == {"out"}


def test_a_target_with_files_is_replaced_only_where_wanted(tmp_path: Path, work: Work) -> None:
    work.result.mkdir()
    work.out.mkdir()
    (work.out / "earlier").touch()
    with pytest.raises(DataError, match="out has appeared meanwhile and is not empty"):
        work.publish(replace=False)
    assert names(work.out) == {"earlier"} and work.result.is_dir()
    work.publish(replace=True)
    assert names(work.out) == set() and names(work.path / "replaced") == {"earlier"}


def test_a_call_that_was_killed_after_its_end_is_recognised(work: Work) -> None:
    work.result.mkdir()
    work.publish(replace=False)
    assert work.tidy(PLAN, False)
    assert names(work.path) == {"lease.json"}


def test_changes_name_both_values() -> None:
    assert changes({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}) == ["b 2, now 4", "new None, now 5"]
