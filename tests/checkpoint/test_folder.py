"""A checkpoint's folder: damage of every kind is found, and the newest whole one is taken."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.find import named_checkpoint, newest_whole
from sleeptrain.checkpoint.folder import checkpoints, find_damage, set_aside
from sleeptrain.checkpoint.keep import remove_after, remove_superfluous, superfluous
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.errors import DataError
from tests.checkpoint.contents import tensors
from tests.checkpoint.worlds import all_or_raise, alone, save
from tests.parallel.processes import run_ranks

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def flip(path: Path, at: float) -> None:
    """One bit, `at` of the way into a file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def rename(checkpoint: Path, name: str) -> None:
    """The manifest calls a file something else."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["files"][name] = manifest["files"].pop("state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: os.truncate(c / SHARD, 500), f"{SHARD} has 500 bytes, not"),
    "longer": (lambda c: (c / SHARD).write_bytes((c / SHARD).read_bytes() + b"x"), f"{SHARD} has"),
    "flipped tensor": (lambda c: flip(c / SHARD, 0.9), f"the checksum of {SHARD}"),
    "flipped header": (lambda c: flip(c / SHARD, 0.01), f"the checksum of {SHARD}"),
    "flipped state": (lambda c: flip(c / "state.json", 0.5), "the checksum of state.json"),
    "missing tensors": (lambda c: (c / SHARD).unlink(), f"{SHARD}: No such file"),
    "missing config": (lambda c: (c / "config.yaml").unlink(), "config.yaml: No such file"),
    "missing manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: No such file"),
    "torn manifest": (lambda c: os.truncate(c / "manifest.json", 100), "manifest.json cannot be read"),
    "another file": (lambda c: (c / "more.safetensors").write_bytes(b""), "more.safetensors is not in manifest.json"),
    "a name outside": (lambda c: rename(c, "../other/x"), "manifest.json names ../other/x, which lies outside of"),
    "an absolute name": (lambda c: rename(c, "/dev/zero"), "manifest.json names /dev/zero, which lies outside of"),
    "a pipe for tensors": (lambda c: pipe(c / SHARD), f"{SHARD} is no plain file"),
    "a pipe for the state": (lambda c: pipe(c / "state.json"), "state.json is no plain file"),
    "a pipe for the manifest": (lambda c: pipe(c / "manifest.json"), "manifest.json is no plain file"),
    "a link to a device": (lambda c: link(c / SHARD, Path("/dev/zero")), f"{SHARD} is no plain file"),
    "empty": (lambda c: [path.unlink() for path in c.iterdir()], "manifest.json: No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, kind: str) -> None:
    for step in (3, 12):
        save(tmp_path, step)
    damage, message = DAMAGE[kind]
    assert newest_whole(tmp_path, alone()).whole == tmp_path / "step-00000012"
    damage(tmp_path / "step-00000012")
    found = newest_whole(tmp_path, alone())
    assert found.whole == tmp_path / "step-00000003"
    (said,) = found.damaged.values()
    assert said.removeprefix(f"{tmp_path / 'step-00000012'}/").startswith(message)


def test_large_files_may_lie_on_another_disk(tmp_path: Path) -> None:
    """The manifest's checksum says that they are what they were."""
    save(tmp_path, 3)
    checkpoint = tmp_path / "step-00000003"
    (checkpoint / SHARD).rename(tmp_path / "elsewhere")
    (checkpoint / SHARD).symlink_to(tmp_path / "elsewhere")
    assert newest_whole(tmp_path, alone()).whole == checkpoint


def test_where_none_is_whole_all_are_listed(tmp_path: Path) -> None:
    for step in (3, 12):
        save(tmp_path, step)
        flip(tmp_path / f"step-{step:08d}" / SHARD, 0.5)
    with pytest.raises(DataError, match=r"no checkpoint .* is whole \(step-00000012: the checksum.*step-00000003: the"):
        newest_whole(tmp_path, alone())
    assert newest_whole(tmp_path / "nothing", alone()).whole is None


def test_each_file_is_checked_by_one_process_and_all_agree(tmp_path: Path) -> None:
    for step in (3, 12):
        save(tmp_path, step)
    for name in (SHARD, "state.json", "config.yaml"):
        shares = [find_damage(tmp_path / "step-00000012", rank, 3) for rank in range(3)]
        assert shares == [None] * 3
        flip(tmp_path / "step-00000012" / name, 0.5)
        shares = [find_damage(tmp_path / "step-00000012", rank, 3) for rank in range(3)]
        assert sorted(damage is None for damage in shares) == [False, True, True]
        found = run_ranks(lambda: str(newest_whole(tmp_path, all_or_raise()).whole), 2)
        assert found == [str(tmp_path / "step-00000003")] * 2
        flip(tmp_path / "step-00000012" / name, 0.5)


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
    with pytest.raises(DataError, match="has format 99, this version of sleeptrain reads 2"):
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


def test_order_is_that_of_steps_and_other_names_do_not_count(tmp_path: Path) -> None:
    for name in ("step-100000000", "step-00000002", "damaged-step-00000009", ".step-00000007.partial-0a", "latest"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-100000000"]


def test_setting_aside_replaces_what_was_set_aside_before(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 3)
        assert set_aside(tmp_path / "step-00000003").name == "damaged-step-00000003"
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("keep", "keep_every", "gone"),
    [(2, 0, [0, 10, 20, 30]), (1, 20, [10, 30]), (5, 0, [0]), (6, 0, []), (9, 7, []), (1, 50, [10, 20, 30, 40])],
)
def test_the_newest_and_the_multiples_stay(keep: int, keep_every: int, gone: list[int]) -> None:
    assert superfluous([0, 10, 20, 30, 40, 50], keep, keep_every) == gone


@pytest.mark.parametrize(
    ("steps", "reach", "gone"),
    [
        ([0, 10, 20, 30, 40, 50], 25, [0, 10]),
        ([0, 10, 20, 30, 40, 50], 10, [0, 10, 20, 30]),
        ([0, 10, 20], 25, []),
        ([30, 40, 50], 15, []),
        ([0], 25, []),
    ],
)
def test_one_far_enough_behind_stays_and_those_that_will_be(steps: list[int], reach: int, gone: list[int]) -> None:
    assert superfluous(steps, 1, 0, reach) == gone


def test_what_is_superfluous_is_removed(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    remove_superfluous(tmp_path, keep=1, keep_every=3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000000", "step-00000003", "step-00000004"]


def test_what_lies_behind_a_step_is_removed_and_the_pointer_follows(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    remove_after(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000000", "step-00000001", "step-00000002"]
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def test_tensors_are_read_back_one_at_a_time_and_without_pickle(tmp_path: Path) -> None:
    written = save(tmp_path, 3)
    files = TensorFiles(tmp_path / "step-00000003")
    assert {name: form.shape for name, form in files.forms.items()} == {n: tuple(t.shape) for n, t in written.items()}
    seen: dict[str, torch.Tensor] = {}
    handed: list[weakref.ref[torch.Tensor]] = []

    def take(name: str, tensor: torch.Tensor) -> None:
        assert sum(ref() is not None for ref in handed) <= 1, "the ones before are gone, but for the loop's last"
        handed.append(weakref.ref(tensor))
        seen[name] = tensor.clone()

    files.read({name: partial(take, name) for name in written})
    assert all(torch.equal(seen[name], tensor) for name, tensor in written.items())
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors(tmp_path / "step-00000003").items())
    assert not any(path.name == ".metadata" for path in (tmp_path / "step-00000003").iterdir()), "nothing pickled"


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    save(tmp_path, 3)
    os.truncate(tmp_path / "step-00000003" / SHARD, 100)
    with pytest.raises(DataError, match="step-00000003 cannot be read"):
        TensorFiles(tmp_path / "step-00000003")


def test_an_older_checkpoint_is_taken_only_where_it_may_be_and_is_told_of(
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
    (told,) = capsys.readouterr().err.splitlines()
    assert "step-00000015 is damaged (the checksum of" in told and told.endswith("step-00000003 is taken")
    assert named_checkpoint(saved / "step-00000003", alone()).name == "step-00000003"
    assert capsys.readouterr().err == ""


def test_a_checkpoint_may_be_looked_at_without_reading_its_tensors(tmp_path: Path) -> None:
    save(tmp_path, 3)
    flip(tmp_path / "step-00000003" / SHARD, 0.5)
    assert find_damage(tmp_path / "step-00000003", tensors=False) is None
    os.truncate(tmp_path / "step-00000003" / SHARD, 500)
    assert "has 500 bytes" in str(find_damage(tmp_path / "step-00000003", tensors=False))
    save(tmp_path, 4)
    flip(tmp_path / "step-00000004" / "state.json", 0.5)
    assert "checksum of state.json" in str(find_damage(tmp_path / "step-00000004", tensors=False))


def test_none_that_is_whole_gives_way_to_damaged_ones(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / SHARD, 500)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    remove_superfluous(tmp_path, keep=2, keep_every=0)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
