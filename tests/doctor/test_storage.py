from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.doctor import storage
from sleeptrain.doctor.finding import FAILED, OK, SKIPPED, Case
from sleeptrain.doctor.sizes import checkpoint_bytes
from tests.doctor.cases import alone

pytestmark = pytest.mark.usefixtures("here")


def has_free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    status = SimpleNamespace(f_bavail=int(size), f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: status)


def test_a_folder_that_can_be_written_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, 2 * storage.GIB)
    assert storage.check_disk(alone(here)).state == OK
    finding = storage.check_disk(alone(here, "run.root=some/where"))
    assert finding.state == OK and str(here) in finding.found
    assert list(here.iterdir()) == []  # no folder is made, no file stays


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "sync"])
def test_a_folder_that_cannot_be_written_to(here: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    if call in ("open", "sync"):  # sync: of the folder, after the file is renamed
        monkeypatch.setattr(f"sleeptrain.files.{call}", fails, raising=False)
    else:
        monkeypatch.setattr(os, call, fails)
    finding = storage.check_disk(alone(here))
    assert finding.state == FAILED and "Read-only file system" in finding.found and "run.root" in finding.cure
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else(here: Path) -> None:
    (here / "runs").mkdir(mode=0o500)
    assert storage.check_disk(alone(here)).state == FAILED


def test_a_root_below_a_file(here: Path) -> None:
    """The root is below a file, such as `/dev/full`."""
    (here / "runs").write_text("")
    assert storage.existing(here / "runs/deep") == here
    found = storage.check_disk(alone(here))
    assert found.state == FAILED and "runs is no folder" in found.found


@pytest.mark.parametrize("name", ["link", "x" * 300])
def test_a_root_that_cannot_be_made(here: Path, name: str) -> None:
    (here / "link").symlink_to(here / "nowhere")
    assert storage.obstacle(here / name / "runs") is not None
    assert storage.obstacle(here / "new" / "runs") is None


def test_a_disk_that_is_nearly_full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, 0.5 * storage.GIB)
    finding = storage.check_disk(alone(here))
    assert finding.state == FAILED and "0.50 GiB" in finding.found


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    folder = here / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_real_disk_that_is_small_and_then_full(small_disk: Path) -> None:
    case = alone(small_disk, f"run.root={small_disk}/runs")
    finding = storage.check_disk(case)
    assert finding.state == FAILED and "GiB free" in finding.found
    (small_disk / "ballast").write_bytes(bytes(2**20 - 2**14))
    finding = storage.check_disk(case)
    assert finding.state == FAILED and "No space left on device" in finding.found
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_room_for_the_checkpoints(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk needs room for the checkpoints that stay and one more, less those that exist."""
    case = alone(here, "run.name=mine", "model.vocab_size=3", "checkpoint.keep=2")
    assert case.config is not None
    size = checkpoint_bytes(case.config)
    has_free(monkeypatch, 3 * size)
    assert storage.check_space(case).state == OK
    has_free(monkeypatch, 3 * size - 1)
    finding = storage.check_space(case)
    assert finding.state == FAILED and "checkpoint.keep" in finding.cure
    there = here / "runs/mine/checkpoints/step-00000001"
    there.mkdir(parents=True)
    (there / "weights").write_bytes(b"x")
    assert storage.check_space(case).state == OK
    assert storage.check_space(alone(here)).state == SKIPPED


def test_the_data_of_the_settings(here: Path) -> None:
    assert storage.check_data(alone(here)).state == SKIPPED
    assert storage.check_data(alone(here, "run.name=mine")).state == OK
    shards = Case(compose(["experiment=stdlib"]), 1, here)
    with pytest.raises(Exception, match=r"tokenizer\.model.*prepare\.py"):
        storage.check_data(shards)
    assert storage.check_space(shards).state == SKIPPED
    with pytest.raises(Exception, match=r"run\.init_from=.* is neither a checkpoint nor"):
        storage.check_data(alone(here, "run.init_from=nothing"))
