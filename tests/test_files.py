from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleeptrain.errors import DataError
from sleeptrain.files import remove_leftovers, staged_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "result"
    with staged_folder(target) as staged:
        (staged / "file").write_text("x")
        assert not target.exists()
    assert names(tmp_path / "a") == ["result"]
    assert names(target) == ["file"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "result") as staged:
        (staged / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_failure_keeps_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(RuntimeError), staged_folder(target, replace=True):
        raise RuntimeError
    assert names(target) == ["old"]


def test_replace(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("x")
    with staged_folder(target, replace=True) as staged:
        (staged / "new").write_text("x")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["result"]


def test_refuses_a_full_folder_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link", "file/below", "x" * 300):
        with pytest.raises(DataError, match=name), staged_folder(tmp_path / name):
            pytest.fail("entered")
    assert names(tmp_path) == ["file", "full", "link"]


def test_a_folder_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with pytest.raises(DataError, match="not empty"), staged_folder(target):
        target.mkdir()
        (target / "theirs").write_text("x")
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["result"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_whole(target, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_only_the_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".latest.partial-0123abcd", ".status.json.old-0123abcd", ".hidden", "latest", ".x.partial-none"):
        (tmp_path / name).touch()
    (tmp_path / ".step-00000007.partial-01234567" / "in").mkdir(parents=True)
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".x.partial-none", "latest"]
