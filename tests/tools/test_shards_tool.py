"""tools/shards.py: tar files made elsewhere become shards, and shards are checked."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.texts import make_texts
from tools.shards import main

DOCUMENTS = [np.arange(3 + number, dtype="<u2") for number in range(7)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(make_texts(20), 320, path)
    return path


def write_tar(path: Path, samples: dict[str, np.ndarray | bytes]) -> None:
    """Write a tar as users of webdataset do: times have a fraction, so each member has an extended header."""
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for key, array in samples.items():
            content = io.BytesIO()
            np.save(content, array)
            tar.write({"__key__": key, "npy": content.getvalue()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "b.tar", {f"{number:03d}": document for number, document in enumerate(DOCUMENTS[:4])})
    write_tar(folder / "c.tar", {f"x/{number:03d}": document for number, document in enumerate(DOCUMENTS[4:])})
    return folder


def index(folder: Path, tokenizer: Path, *more: str) -> int:
    return main(["index", str(folder), "--tokenizer", str(tokenizer), *more])


def test_foreign_tars_become_shards(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars = {path: path.read_bytes() for path in folder.iterdir()}
    assert index(folder, tokenizer) == 0
    assert "2 shards, 7 documents, 42 tokens" in capsys.readouterr().out
    shards = TokenShards(folder, expect_tokenizer=load_tokenizer(tokenizer).hash)
    found = [shards.document(*which).tolist() for which in [(0, i) for i in range(4)] + [(1, i) for i in range(3)]]
    assert found == [document.tolist() for document in DOCUMENTS]
    assert shards.num_bytes == 0
    assert json.loads((folder / "index.json").read_text())["name"] == "tars"
    assert all(path.read_bytes() == content for path, content in tars.items())
    assert main(["verify", str(folder)]) == 0
    assert "2 shards, 7 documents, all as they were written" in capsys.readouterr().out


def test_wide_tokens_of_a_small_vocabulary(folder: Path, tokenizer: Path) -> None:
    for path in folder.glob("*.tar"):
        write_tar(path, {"a": np.arange(5, dtype="<u4")})
    assert index(folder, tokenizer) == 0
    assert TokenShards(folder).document(1, 0).dtype == np.uint32


def test_our_shards_get_the_same_index(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "ours"
    shards = write_shards(folder, make_texts(30), load_tokenizer(tokenizer), name="mine", shard_bytes=20_000)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.glob("*.npy"):
        path.unlink()
    assert index(folder, tokenizer) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert index(folder, tokenizer, "--name", "other") == 0
    assert json.loads((folder / "index.json").read_text())["name"] == "other"
    assert TokenShards(folder).fingerprint == shards.fingerprint


def test_changed_shards_lose_the_count_of_bytes(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "ours"
    write_shards(folder, make_texts(30), load_tokenizer(tokenizer), name="mine", shard_bytes=20_000)
    write_tar(folder / "shard-000000.tar", {"a": np.arange(9, dtype="<u2")})
    assert index(folder, tokenizer) == 0
    assert TokenShards(folder).num_bytes == 0
    assert main(["verify", str(folder)]) == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "an empty tar file"),
        ({"b": DOCUMENTS[0], "a": DOCUMENTS[1]}, "'a', at byte .* comes after 'b'; keys must ascend"),
        ({"a": DOCUMENTS[0].astype("<i4")}, "'a', at byte .* is of type <i4"),
        ({"a": DOCUMENTS[0].astype("|u1")}, r"'a', at byte .* is of type \|u1"),
        ({"a": DOCUMENTS[0].astype("<u4")}, "'a', at byte .* is of type <u4; all documents must be of one type"),
        ({"a": DOCUMENTS[0][:0]}, "'a', at byte .* holds no token"),
        ({"a": np.array([1, 320], "<u2")}, "'a', at byte .* holds id 320, but the tokenizer has 320 ids"),
        ({"a": np.zeros((2, 3), "<u2")}, r"at byte 1024: .*\[2, 3\] is not one-dimensional"),
        ({"a.b": DOCUMENTS[0]}, r"at byte 1024: .*'a\.b\.npy' is no \.npy file"),
    ],
)
def test_refusals(
    folder: Path, tokenizer: Path, samples: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(folder / "c.tar", samples)
    assert index(folder, tokenizer) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shards: {folder / 'c.tar'}: ")
    assert re.search(message, line)
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize("link", [os.link, os.symlink, lambda _, name: os.mkfifo(name)])
def test_two_names_of_one_file(
    folder: Path, tokenizer: Path, link: Callable[[Path, Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    link(next(folder.glob("*.tar")), folder / "z.tar")
    assert index(folder, tokenizer) == 2
    said = capsys.readouterr().err
    assert "documents would count double; remove one name" in said or "z.tar is no plain file" in said


def test_doubled_keys(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(folder / "c.tar", "w") as tar:
        for _ in range(2):
            content = io.BytesIO()
            np.save(content, DOCUMENTS[0])
            info = tarfile.TarInfo("a.npy")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)
    assert index(folder, tokenizer) == 2
    assert "without doubles" in capsys.readouterr().err


def test_folders_and_names_that_are_refused(
    folder: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index(tmp_path, tokenizer) == 2
    assert "no tar file here" in capsys.readouterr().err
    (folder / "b.tar").rename(folder / "b c.tar")
    assert index(folder, tokenizer) == 2
    assert "rename the file" in capsys.readouterr().err


def test_verify_prints_a_line_for_each_problem(
    folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(folder, tokenizer)
    sidecar = folder / "b.index.npy"
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    with (folder / "c.tar").open("r+b") as file:
        file.write(b"y")
    os.utime(folder / "c.tar", (0, 0))
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, end in zip(lines, ("b.index.npy: does not", "c.tar: damaged", "2 of 2 shards are damaged"), strict=True):
        assert end in line


def test_verify_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
