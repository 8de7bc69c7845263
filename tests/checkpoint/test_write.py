"""A checkpoint is written whole or not at all, whatever fails and whenever the process is killed."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch

from sleeptrain.checkpoint import commit as commit_module
from sleeptrain.checkpoint import folder as folder_module
from sleeptrain.checkpoint import write as write_module
from sleeptrain.checkpoint.find import newest_whole
from sleeptrain.checkpoint.folder import checkpoints, find_damage
from sleeptrain.checkpoint.place import Tensors
from sleeptrain.checkpoint.write import write
from sleeptrain.errors import CheckpointError
from sleeptrain.files import remove_leftovers
from tests.checkpoint.test_folder import SHARD
from tests.checkpoint.worlds import DOCUMENTS, all_or_raise, alone, nothing, save
from tests.parallel.processes import run_ranks


def test_the_folder_is_what_the_manifest_says_and_latest_points_to_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpoint = tmp_path / "step-00000003"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {*files, "manifest.json"} == set(os.listdir(checkpoint))
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003"]


def test_each_process_writes_what_it_owns_into_files_of_its_own(tmp_path: Path) -> None:
    def run() -> list[str]:
        return list(save(tmp_path, 3, all_or_raise()))

    owned = run_ranks(run, 3)
    files = sorted((tmp_path / "step-00000003").glob("*.safetensors"))
    assert [list(safetensors.torch.load_file(path)) for path in files] == owned == [[f"model/of{i}"] for i in range(3)]
    assert find_damage(tmp_path / "step-00000003") is None


def test_processes_that_write_to_different_places_say_so(tmp_path: Path) -> None:
    def run() -> None:
        world = all_or_raise()
        with pytest.raises(CheckpointError, match=r"shard-00002.* put run\.root where all can"):
            save(tmp_path / str(world.rank), 3, world)

    run_ranks(run, 2)
    assert not checkpoints(tmp_path / "0") and not checkpoints(tmp_path / "1")


def test_a_process_with_nothing_to_write_makes_no_file(tmp_path: Path) -> None:
    def run() -> None:
        world = all_or_raise()
        tensors = {"model/x": torch.ones(3)} if world.rank == 0 else {}
        write(tmp_path / "step-00000003", tensors, DOCUMENTS, world, nothing)

    run_ranks(run, 2)
    assert [path.name for path in (tmp_path / "step-00000003").glob("*.safetensors")] == [SHARD]
    assert find_damage(tmp_path / "step-00000003") is None


def test_the_checksum_is_made_of_what_is_written_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that changes what it stores is found out."""
    plain = write_module.write_tensors

    def write_and_flip(file: BinaryIO, tensors: Tensors) -> object:
        entry = plain(file, tensors)
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
        return entry

    monkeypatch.setattr(write_module, "write_tensors", write_and_flip)
    save(tmp_path, 3)
    assert f"the checksum of {SHARD}" in str(find_damage(tmp_path / "step-00000003"))


def test_a_damaged_checkpoint_of_the_same_step_gives_way(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    save(tmp_path, 3)
    assert find_damage(tmp_path / "step-00000003") is None
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that takes files of at most `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [30, 24_000])
def test_a_full_disk_leaves_the_one_before_and_no_trace(tmp_path: Path, size: int) -> None:
    save(tmp_path, 1)
    with files_of_at_most(size), pytest.raises(CheckpointError, match=r"File too large"):
        save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001"]
    assert newest_whole(tmp_path, alone()).whole == tmp_path / "step-00000001"
    save(tmp_path, 2)
    assert newest_whole(tmp_path, alone()).whole == tmp_path / "step-00000002"


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints"):
        save(place, 1)


FAULTS = [("tensors", 1), ("tensors", 0), ("manifest", 0), ("rename", 0), ("records", 0)]


def break_at(fault: str, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    match fault:
        case "tensors":
            patch.setattr(write_module, "write_tensors", fail)
        case "manifest":
            patch.setattr(folder_module, "write_whole", fail)
        case "rename":
            patch.setattr(commit_module, "set_in_place", fail)


@pytest.mark.parametrize(("fault", "rank"), FAULTS)
def test_all_processes_raise_the_error_of_one_and_nothing_is_committed(tmp_path: Path, fault: str, rank: int) -> None:
    def run() -> str:
        world = all_or_raise()
        save(tmp_path, 1, world)
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == rank:
                break_at(fault, patch)

            def records() -> None:
                if fault == "records":
                    raise OSError(28, "No space left on device")

            with pytest.raises(CheckpointError) as caught:
                save(tmp_path, 2, world, records)
        world.all_or_raise(lambda: None)
        assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
        world.all_or_raise(lambda: None)
        save(tmp_path, 3, world)
        return str(caught.value)

    messages = run_ranks(run, 2)
    assert all("No space left on device" in text for text in messages)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000003"]
    assert newest_whole(tmp_path, alone()).whole == tmp_path / "step-00000003"


# The folder's state when the process is killed: (module, function, number of the call that would have come next).
KILLED: dict[str, tuple[Any, str, int]] = {
    "an empty file": (write_module, "write_tensors", 1),
    "an unsynced file": (os, "fsync", 1),
    "no state": (folder_module, "write_whole", 1),
    "no config": (folder_module, "write_whole", 2),
    "no manifest": (folder_module, "write_whole", 3),
    "no name": (commit_module, "set_in_place", 1),
    "no pointer": (folder_module, "write_whole", 4),
}


def killing(patch: pytest.MonkeyPatch, point: str) -> None:
    owner, name, number = KILLED[point]
    plain, calls = getattr(owner, name), [0]

    def kill(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    patch.setattr(owner, name, kill)


@pytest.mark.parametrize("point", KILLED)
def test_killed_while_writing(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, point)
            save(tmp_path, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    expected = "step-00000002" if point == "no pointer" else "step-00000001"
    assert newest_whole(tmp_path, alone()).whole == tmp_path / expected
    remove_leftovers(tmp_path)
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000002"]
    assert newest_whole(tmp_path, alone()).whole == tmp_path / "step-00000002"
