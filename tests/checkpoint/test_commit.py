"""Checkpoints in object stores: an S3 server over HTTP, and fsspec's store in memory. `test_write.py` has disks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint import commit as commit_module
from sleeptrain.checkpoint import folder as folder_module
from sleeptrain.checkpoint import write as write_module
from sleeptrain.checkpoint.commit import remove_unfinished
from sleeptrain.checkpoint.find import named_checkpoint, newest_whole
from sleeptrain.checkpoint.folder import checkpoints, find_damage, remove_remote, set_aside
from sleeptrain.checkpoint.keep import remove_superfluous
from sleeptrain.checkpoint.place import Place, Slice
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.write import write
from sleeptrain.cli import main
from sleeptrain.errors import CheckpointError, DataError
from sleeptrain.remote import UrlPath, named_place
from sleeptrain.report.runs import find_runs
from tests.checkpoint.stores import HAS_S3, reset_memory, s3_server
from tests.checkpoint.test_folder import SHARD
from tests.checkpoint.worlds import DOCUMENTS, all_or_raise, alone, nothing, save
from tests.parallel.processes import run_ranks
from tests.train.test_trainer import run

NEEDS_S3 = [pytest.mark.slow, pytest.mark.skipif(not HAS_S3, reason="needs moto, flask and s3fs")]


def needs_s3(test: Any) -> Any:
    for mark in NEEDS_S3:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["memory", pytest.param("s3", marks=NEEDS_S3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UrlPath]:
    """An empty folder of a run."""
    if request.param == "s3":
        request.getfixturevalue("server")
    place = named_place(f"{request.param}://bucket/{tmp_path.name}/r")
    assert isinstance(place, UrlPath)
    yield place
    reset_memory()


def names(store: UrlPath) -> list[str]:
    return [path.name for path in checkpoints(store)]


def damage(path: UrlPath) -> None:
    """Change the last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_checkpoint_is_written_found_and_read_whole_and_in_part(store: UrlPath) -> None:
    written = save(store, 3)
    (checkpoint,) = checkpoints(store)
    assert find_damage(checkpoint) is None and newest_whole(store, alone()).whole == checkpoint
    files = TensorFiles(checkpoint)
    assert files.forms.keys() == written.keys()
    assert all(torch.equal(files.tensor(name), tensor) for name, tensor in written.items())
    columns = Slice.cut((10, 100), {1: [(0, 5), (90, 100)]})
    expected = written["model/weight1"].index_select(1, torch.tensor([*range(5), *range(90, 100)]))
    assert torch.equal(files.elements("model/weight1", Place.of(columns)).view(10, 15), expected)
    assert named_checkpoint(store, alone()) == named_checkpoint(checkpoint, alone()) == checkpoint
    assert (store / "latest").read_bytes() == b"step-00000003\n"


def test_damage_is_found_and_the_checkpoint_before_is_taken(store: UrlPath) -> None:
    for step in (1, 2, 3, 4):
        save(store, step)
    damage(store / "step-00000002" / SHARD)
    (store / "step-00000003" / "state.json").unlink()
    manifest = store / "step-00000004" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"config.yaml", b"../otherone"))
    found = newest_whole(store, alone())
    assert found.whole == store / "step-00000001"
    assert {path.name: text for path, text in found.damaged.items()} == {
        "step-00000002": f"the checksum of {SHARD} is not that of manifest.json",
        "step-00000003": "state.json: No such file or directory",
        "step-00000004": f"manifest.json names ../otherone, which lies outside of {store}/step-00000004",
    }
    aside = set_aside(store / "step-00000003")
    assert aside.name == "damaged-step-00000003" and (aside / SHARD).is_file()
    assert names(store) == ["step-00000001", "step-00000002", "step-00000004"]


def test_superfluous_checkpoints_are_removed(store: UrlPath) -> None:
    for step in range(6):
        save(store, step)
    remove_superfluous(store, keep=2, keep_every=3)
    assert names(store) == [f"step-{step:08d}" for step in (0, 3, 4, 5)]
    assert not (store / "step-00000001").exists()


def test_what_has_no_manifest_does_not_count_and_is_removed(store: UrlPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before the manifest is written, and so does not clean up."""
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        patch.setattr("sleeptrain.checkpoint.write.discard", lambda _: None)
        with pytest.raises(CheckpointError, match="killed"):
            save(store, 2)
    assert (store / "step-00000002" / SHARD).is_file()
    assert names(store) == ["step-00000001"] and newest_whole(store, alone()).damaged == {}
    (store / "step-00000002" / "shard-00009.safetensors").write_bytes(b"of a larger world")
    save(store, 2)
    assert find_damage(store / "step-00000002") is None, "nothing of the earlier try is mixed with it"
    (store / "step-00000003" / SHARD).write_bytes(b"x")
    remove_unfinished(store)
    assert not (store / "step-00000003").exists() and names(store) == ["step-00000001", "step-00000002"]


def test_a_store_that_fails_leaves_the_one_before_and_no_trace(store: UrlPath, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(CheckpointError, match="No space"):
            save(store, 2)
    assert names(store) == ["step-00000001"] and not (store / "step-00000002").exists()
    save(store, 2)
    assert find_damage(store / "step-00000002") is None


# The state of the store when the process is killed: the module and the function that would have been called next.
KILLED: dict[str, tuple[Any, str]] = {
    "nothing yet": (write_module, "write_tensors"),
    "no documents": (commit_module, "write_file"),
    "no manifest": (commit_module, "write_manifest"),
    "no pointer": (commit_module, "point_to"),
}


@needs_s3
@pytest.mark.parametrize("point", KILLED)
def test_killed_while_writing(server: str, tmp_path: Path, point: str) -> None:
    store = UrlPath(f"s3://bucket/{tmp_path.name}")

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save(store, 1)
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*KILLED[point], kill)
            save(store, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    expected = "step-00000002" if point == "no pointer" else "step-00000001"
    assert newest_whole(store, alone()).whole == store / expected
    remove_unfinished(store)
    assert names(store)[-1] == expected and (store / "step-00000002").exists() == (point == "no pointer")
    save(store, 2)
    assert newest_whole(store, alone()).whole == store / "step-00000002"


@needs_s3
def test_a_file_of_many_parts(server: str, tmp_path: Path) -> None:
    """S3 takes large files in parts; the checksum is that of the whole file."""
    store = UrlPath(f"s3://bucket/{tmp_path.name}")
    tensors = {"model/x": torch.arange(30 * 2**20, dtype=torch.int32)}
    write(store / "step-00000003", tensors, DOCUMENTS, alone(), nothing)
    (checkpoint,) = checkpoints(store)
    assert find_damage(checkpoint) is None
    assert torch.equal(TensorFiles(checkpoint).tensor("model/x"), tensors["model/x"])


@needs_s3
def test_several_processes_write_and_check_one(server: str, tmp_path: Path) -> None:
    store = UrlPath(f"s3://bucket/{tmp_path.name}")

    def run() -> str:
        world = all_or_raise()
        save(store, 3, world)
        found = newest_whole(store, world).whole
        assert found is not None
        files = TensorFiles(found, world)
        assert all(files.tensor(f"model/of{rank}").unique().tolist() == [3.0] for rank in range(3))
        return found.name

    assert run_ranks(run, 3) == ["step-00000003"] * 3
    manifest = json.loads((store / "step-00000003" / "manifest.json").read_bytes())
    assert sum(name.endswith(".safetensors") for name in manifest["files"]) == 3


def test_a_protocol_that_fsspec_does_not_know_is_refused() -> None:
    with pytest.raises(DataError, match=r"nosuch://bucket: fsspec cannot open nosuch:// here"):
        newest_whole(UrlPath("nosuch://bucket"), alone())


def test_a_run_keeps_its_checkpoints_in_a_store_and_goes_on_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reset_memory()
    setting, store = "checkpoint.folder=memory://bucket/runs", UrlPath("memory://bucket/runs/r")
    run(tmp_path / "here")
    run(tmp_path / "there", setting)
    folder = tmp_path / "there" / "r"
    assert names(store) == ["step-00000009", "step-00000012"] and names_of(folder / "checkpoints") == ["latest"]
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000012\n"
    last = checkpoints(tmp_path / "here" / "r" / "checkpoints")[-1]
    assert same_tensors(TensorFiles(store / "step-00000012"), TensorFiles(last))
    remove_remote(store / "step-00000012")
    (store / "step-00000010" / SHARD).write_bytes(b"not completed")
    run(tmp_path / "there", setting)
    assert "going on from the checkpoint of step 9" in capsys.readouterr().err
    assert names(store) == ["step-00000009", "step-00000012"] and not (store / "step-00000010").exists()
    assert same_tensors(TensorFiles(store / "step-00000012"), TensorFiles(last))
    assert main(["evaluate", str(folder), "--json"]) == 2
    assert f"say that its checkpoints are in {store}; name that place" in capsys.readouterr().err
    for place in (str(store), str(store / "step-00000012")):
        assert main(["evaluate", place, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["checkpoint"] == str(store / "step-00000012")
    [found], _ = find_runs([folder])
    assert f"its checkpoints are in {store}, which was not asked for them" in found.notes
    run(tmp_path / "more", f"run.init_from={store}", "run.name=more")
    assert len(checkpoints(tmp_path / "more" / "more" / "checkpoints")) == 2
    reset_memory()


def test_a_run_whose_checkpoints_are_all_damaged_starts_over_where_that_is_meant(tmp_path: Path) -> None:
    reset_memory()
    setting, store = "checkpoint.folder=memory://bucket/runs", UrlPath("memory://bucket/runs/r")
    run(tmp_path, setting)
    for checkpoint in checkpoints(store):
        (checkpoint / "state.json").unlink()
    with pytest.raises(DataError, match=r"no checkpoint in memory://bucket/runs/r is whole"):
        run(tmp_path, setting)
    run(tmp_path, setting, "run.start_over=true")
    assert names(store) == ["step-00000009", "step-00000012"]
    assert (store / "damaged-step-00000012" / SHARD).is_file()
    reset_memory()


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_tensors(a: TensorFiles, b: TensorFiles) -> bool:
    assert a.forms.keys() == b.forms.keys()
    return all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.forms)
