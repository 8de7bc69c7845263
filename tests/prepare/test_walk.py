"""The files below a folder: what a pattern matches, and each file once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleeptrain.errors import DataError
from sleeptrain.prepare.walk import each_once, matches, names_below


@pytest.mark.parametrize(
    ("path", "pattern", "wanted"),
    [
        ("a.txt", "*.txt", True),
        ("sub/a.txt", "*.txt", False),
        ("sub/a.txt", "**/*.txt", True),
        ("a.txt", "**/*.txt", True),
        ("x/y/z/a.txt", "x/**/a.txt", True),
        ("y/a.txt", "x/**/a.txt", False),
        ("a.TXT", "*.txt", False),
        ("a", "a/b", False),
        ("a/b", "**", True),
    ],
)
def test_patterns_go_part_by_part(path: str, pattern: str, wanted: bool) -> None:
    assert matches(path.split("/"), pattern.split("/")) is wanted


@pytest.mark.parametrize(("path", "pattern"), [(".a.txt", "*.txt"), (".sub/a.txt", "**/*.txt"), ("x/.a", "x/*")])
def test_hidden_names_are_matched_where_wanted_or_named(path: str, pattern: str) -> None:
    names, parts = path.split("/"), pattern.split("/")
    assert matches(names, parts) and not matches(names, parts, hidden=False)
    assert matches([".a.txt"], [".*.txt"], hidden=False)


def test_each_folder_is_listed_once_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "m" / "deep").mkdir(parents=True)
    (tmp_path / "m" / "deep" / "a.txt").touch()
    for link in ("again", "z"):
        (tmp_path / link).symlink_to("m")
    (tmp_path / "m" / "deep" / "up").symlink_to("..")
    assert list(names_below(tmp_path, "**/*.txt")) == ["m/deep/a.txt"]


def test_links_to_nothing_are_reported_whatever_their_name(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    assert list(names_below(tmp_path, "*.txt")) == ["gone"]
    assert each_once(tmp_path, ["gone"]) == ([], ["gone (No such file or directory)"])


def test_a_file_is_chosen_once_and_by_a_name_that_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "a").symlink_to("b")
    os.link(tmp_path / "b", tmp_path / "c")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert each_once(tmp_path, ["pipe", "c", "folder", "b", "a"]) == (["b"], ["pipe (no plain file)"])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: cannot be read: No such file or directory"):
        list(names_below(tmp_path / "absent", "*"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot be listed: Not a directory"):
        list(names_below(tmp_path / "file", "*"))
