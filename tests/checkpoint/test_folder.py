"""A checkpoint's folder: damage of every kind is found, and the newest whole checkpoint is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.checkpoint.find import newest_whole
from sleeptrain.checkpoint.folder import checkpoints, find_damage, set_aside
from tests.checkpoint.worlds import all_or_raise, alone, save
from tests.parallel.processes import run_ranks

SHARD = "shard-00001.safetensors"


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
def test_damage_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path, kind: str) -> None:
    for step in (3, 12):
        save(tmp_path, step)
    damage, message = DAMAGE[kind]
    assert newest_whole(tmp_path, alone()).whole == tmp_path / "step-00000012"
    damage(tmp_path / "step-00000012")
    found = newest_whole(tmp_path, alone())
    assert found.whole == tmp_path / "step-00000003"
    (problem,) = found.damaged.values()
    assert problem.removeprefix(f"{tmp_path / 'step-00000012'}/").startswith(message)


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


def test_order_is_that_of_steps_and_other_names_do_not_count(tmp_path: Path) -> None:
    for name in ("step-100000000", "step-00000002", "damaged-step-00000009", ".step-00000007.partial-0a", "latest"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-100000000"]


def test_a_damaged_checkpoint_set_aside_replaces_an_earlier_one(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 3)
        assert set_aside(tmp_path / "step-00000003").name == "damaged-step-00000003"
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_may_be_checked_without_reading_its_tensors(tmp_path: Path) -> None:
    save(tmp_path, 3)
    flip(tmp_path / "step-00000003" / SHARD, 0.5)
    assert find_damage(tmp_path / "step-00000003", tensors=False) is None
    os.truncate(tmp_path / "step-00000003" / SHARD, 500)
    assert "has 500 bytes" in str(find_damage(tmp_path / "step-00000003", tensors=False))
    save(tmp_path, 4)
    flip(tmp_path / "step-00000004" / "state.json", 0.5)
    assert "checksum of state.json" in str(find_damage(tmp_path / "step-00000004", tensors=False))
