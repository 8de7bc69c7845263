"""The checkpoints that stay, and those that are removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.checkpoint.keep import remove_after, remove_superfluous, superfluous
from tests.checkpoint.test_folder import SHARD
from tests.checkpoint.worlds import save


@pytest.mark.parametrize(
    ("keep", "keep_every", "removed"),
    [(2, 0, [0, 10, 20, 30]), (1, 20, [10, 30]), (5, 0, [0]), (6, 0, []), (9, 7, []), (1, 50, [10, 20, 30, 40])],
)
def test_the_newest_and_the_multiples_stay(keep: int, keep_every: int, removed: list[int]) -> None:
    assert superfluous([0, 10, 20, 30, 40, 50], keep, keep_every) == removed


@pytest.mark.parametrize(
    ("steps", "reach", "removed"),
    [
        ([0, 10, 20, 30, 40, 50], 25, [0, 10]),
        ([0, 10, 20, 30, 40, 50], 10, [0, 10, 20, 30]),
        ([0, 10, 20], 25, []),
        ([30, 40, 50], 15, []),
        ([0], 25, []),
    ],
)
def test_a_checkpoint_far_back_stays_and_those_that_will_be(steps: list[int], reach: int, removed: list[int]) -> None:
    assert superfluous(steps, 1, 0, reach) == removed


def test_superfluous_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    remove_superfluous(tmp_path, keep=1, keep_every=3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000000", "step-00000003", "step-00000004"]


def test_checkpoints_after_a_step_are_removed_and_the_pointer_follows(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    remove_after(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000000", "step-00000001", "step-00000002"]
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def test_no_whole_checkpoint_is_removed_in_favour_of_a_damaged_one(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / SHARD, 500)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    remove_superfluous(tmp_path, keep=2, keep_every=0)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
