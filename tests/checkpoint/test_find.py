"""All processes find the same newest whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleeptrain.checkpoint.find import named_checkpoint, newest_whole
from sleeptrain.errors import DataError
from tests.checkpoint.test_folder import SHARD, flip
from tests.checkpoint.worlds import all_or_raise, alone, save
from tests.parallel.processes import run_ranks


def test_large_files_may_lie_on_another_disk(tmp_path: Path) -> None:
    """The checksum in the manifest shows that they have not changed."""
    save(tmp_path, 3)
    checkpoint = tmp_path / "step-00000003"
    (checkpoint / SHARD).rename(tmp_path / "elsewhere")
    (checkpoint / SHARD).symlink_to(tmp_path / "elsewhere")
    assert newest_whole(tmp_path, alone()).whole == checkpoint


def test_where_all_are_damaged_all_are_listed(tmp_path: Path) -> None:
    for step in (3, 12):
        save(tmp_path, step)
        flip(tmp_path / f"step-{step:08d}" / SHARD, 0.5)
    with pytest.raises(DataError, match=r"no checkpoint .* is whole \(step-00000012: the checksum.*step-00000003: the"):
        newest_whole(tmp_path, alone())
    assert newest_whole(tmp_path / "nothing", alone()).whole is None


def test_processes_that_see_different_files_say_so(tmp_path: Path) -> None:
    def look() -> None:
        world = all_or_raise()
        save(tmp_path / str(world.rank), 3)
        if world.rank:
            save(tmp_path / str(world.rank), 4)
        with pytest.raises(DataError, match=r"put run\.root where all can read it"):
            newest_whole(tmp_path / str(world.rank), world)

    run_ranks(look, 2)


def test_another_format_is_refused_not_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path, 3)
    manifest = tmp_path / "step-00000003" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="has format 99, this version of sleeptrain reads 2 and 3"):
        newest_whole(tmp_path, alone())


def test_a_place_names_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    for step in (3, 12):
        save(tmp_path / "checkpoints", step)
    assert named_checkpoint(tmp_path, alone()).name == "step-00000012"
    assert named_checkpoint(tmp_path / "checkpoints" / "step-00000003", alone()).name == "step-00000003"
    flip(tmp_path / "checkpoints" / "step-00000003" / SHARD, 0.5)
    with pytest.raises(DataError, match="step-00000003 is damaged: the checksum"):
        named_checkpoint(tmp_path / "checkpoints" / "step-00000003", alone())
    with pytest.raises(DataError, match="neither a checkpoint nor the folder of a run"):
        named_checkpoint(tmp_path / "none", alone())
    with pytest.raises(DataError, match=r"run\.init_from=.*none is neither a checkpoint nor"):
        named_checkpoint(tmp_path / "none", alone(), "run.init_from")


def test_an_older_checkpoint_is_taken_only_where_allowed_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "checkpoints"
    for step in (3, 12, 15):
        save(saved, step)
    flip(saved / "step-00000015" / SHARD, 0.5)
    flip(saved / "step-00000012" / "state.json", 0.5)
    with pytest.raises(DataError) as refusal:
        named_checkpoint(tmp_path, alone())
    for word in ("step-00000015 is damaged (the checksum of", "step-00000012 is", str(saved / "step-00000003")):
        assert word in str(refusal.value)
    assert str(refusal.value).endswith("add --allow-older (of lm_eval allow_older=True)")
    with pytest.raises(DataError, match=r"^run\.init_from=.* or add run\.allow_older=true$"):
        named_checkpoint(tmp_path, alone(), "run.init_from")
    assert capsys.readouterr().err == ""
    assert named_checkpoint(tmp_path, alone(), allow_older=True).name == "step-00000003"
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000015 is damaged (the checksum of" in line and line.endswith("step-00000003 is taken")
    assert named_checkpoint(saved / "step-00000003", alone()).name == "step-00000003"
    assert capsys.readouterr().err == ""


def test_later_checkpoints_may_be_skipped(tmp_path: Path) -> None:
    for step in (3, 12):
        save(tmp_path, step)
    assert newest_whole(tmp_path, alone(), last=11).whole == tmp_path / "step-00000003"
    assert newest_whole(tmp_path, alone(), last=12).whole == tmp_path / "step-00000012"
    assert newest_whole(tmp_path, alone(), last=2).whole is None
