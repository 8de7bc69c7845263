"""Files that other files name: inside the folder and plain, or refused before they are opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.errors import DataError
from sleeptrain.plain_files import named_file, require_plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("in/a", "in/sub/b", "outside"):
        (tmp_path / name).write_text("x")
    return tmp_path / "in"


@pytest.mark.parametrize("name", ["a", "sub/b", "missing", "a/b"])
def test_a_name_inside(folder: Path, name: str) -> None:
    assert named_file(folder, name, folder / "index") == folder / name


def test_a_link_inside(folder: Path) -> None:
    (folder / "link").symlink_to("sub/b")
    os.link(folder / "a", folder / "hard")
    assert named_file(folder, "link", folder / "index") == folder / "link"
    assert named_file(folder, "hard", folder / "index") == folder / "hard"


@pytest.mark.parametrize("name", ["../outside", "sub/../../outside", "/etc/passwd", "..", "/dev/zero", "../nowhere"])
@pytest.mark.parametrize("follow", [False, True])
def test_a_name_that_leads_out(folder: Path, name: str, follow: bool) -> None:
    with pytest.raises(DataError, match=r"index names .*, which lies outside of .*/in; take index and what it names"):
        named_file(folder, name, folder / "index", follow)


@pytest.mark.parametrize("name", [None, 3, "a\0b", ["a"]])
def test_other_values_than_names_are_refused(folder: Path, name: Any) -> None:
    with pytest.raises(DataError, match="which is no name of a file"):
        named_file(folder, name, folder / "index")


def test_a_link_that_leads_out(folder: Path) -> None:
    (folder / "link").symlink_to("../outside")
    (folder / "away").symlink_to(folder.parent)
    for name in ("link", "away/outside"):
        with pytest.raises(DataError, match=r"is a link to .*/outside, outside of .*/in; put the file itself there"):
            named_file(folder, name, folder / "index")
        assert named_file(folder, name, folder / "index", follow=True) == folder / name


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    """`huggingface_hub` stores a snapshot as links to files that all snapshots share."""
    model = tmp_path / "models--a--b"
    (model / "blobs").mkdir(parents=True)
    (model / "blobs/0f").write_text("x")
    snapshot = model / "snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f")
    (snapshot / "other").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("x")
    assert named_file(snapshot, "model.safetensors", snapshot / "index").read_text() == "x"
    with pytest.raises(DataError, match="is a link"):
        named_file(snapshot, "other", snapshot / "index")


def test_files_that_are_not_plain_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "sub", "."):
        with pytest.raises(DataError, match="is no plain file"):
            named_file(folder, name, folder / "index", follow=True)
        with pytest.raises(DataError, match="is no plain file"):
            require_plain(folder / name)
    require_plain(folder / "a")
    require_plain(folder / "missing")
    (folder / "round").symlink_to("round")
    assert named_file(folder, "round", folder / "index") == folder / "round", "whoever opens it says what is wrong"
