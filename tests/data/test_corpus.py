from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.data.corpus import folder_corpus, split_names, stdlib_corpus
from sleeptrain.errors import DataError


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_stdlib_is_source_without_tests() -> None:
    corpus = stdlib_corpus()
    assert len(corpus.names) > 300
    assert list(corpus.names) == sorted(set(corpus.names))
    assert {"argparse.py", "asyncio/base_events.py", "LICENSE.txt"} & set(corpus.names) >= {"argparse.py"}
    parts = {part for name in corpus.names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    assert stdlib_corpus() == corpus


def test_folder_reads_text_as_it_is(tmp_path: Path) -> None:
    fill(tmp_path, {"b.txt": b"\ttwo\r\n  lines\n", "sub/a.txt": "é".encode(), "c.md": b"x"})
    corpus = folder_corpus(tmp_path, "*.txt")
    assert corpus.names == ("b.txt", "sub/a.txt")
    assert list(corpus.texts(corpus.names)) == ["\ttwo\r\n  lines\n", "é"]


def test_broken_encoding_and_empty_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": b"\xff\xfe", "b.txt": b"", "c.txt": b"good", "d.txt": b""})
    corpus = folder_corpus(tmp_path)
    assert (corpus.names, corpus.undecodable, corpus.empty) == (("c.txt",), ("a.txt",), 2)


def test_max_documents_keeps_the_first(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": b"", "b.txt": b"1", "c.txt": b"2", "d.txt": b"3"})
    assert folder_corpus(tmp_path, max_documents=2).names == ("b.txt", "c.txt")


def test_sha256_tells_names_and_contents_apart(tmp_path: Path) -> None:
    variants = [{"a.txt": b"xy", "b.txt": b"z"}, {"a.txt": b"xyb.txtz"}, {"a.txt": b"xy", "c.txt": b"z"}]
    digests = [folder_corpus(fill(tmp_path / str(i), files)).sha256 for i, files in enumerate(variants)]
    assert len(set(digests)) == 3
    assert folder_corpus(fill(tmp_path / "again", variants[0])).sha256 == digests[0]


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        folder_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file matches '\*\.txt'"):
        folder_corpus(tmp_path)
    with pytest.raises(DataError, match="not a pattern relative"):
        folder_corpus(tmp_path, "/absolute")
    with pytest.raises(DataError, match="1 files are not UTF-8, 1 are empty"):
        folder_corpus(fill(tmp_path, {"a.txt": b"\xff", "b.txt": b""}))


def test_split_depends_on_the_name_alone() -> None:
    names = [f"module{i}.py" for i in range(2000)]
    train, validation = split_names(names, 0.05)
    assert sorted(train + validation) == sorted(names)
    assert 60 < len(validation) < 140
    assert train == sorted(train, key=names.index)
    fewer_train, fewer_validation = split_names(names[::3], 0.05)
    assert set(fewer_train) <= set(train)
    assert set(fewer_validation) <= set(validation)


def test_split_leaves_no_side_empty() -> None:
    for share in (1e-9, 1 - 1e-9):
        train, validation = split_names(["a", "b", "c"], share)
        assert train and validation
        assert len(train) + len(validation) == 3
    with pytest.raises(DataError, match="at least 2"):
        split_names(["a"], 0.5)
