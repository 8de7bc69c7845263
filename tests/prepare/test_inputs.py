from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import folder_inputs, named_inputs, stdlib_inputs


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_stdlib_is_source_without_tests() -> None:
    names = [source.name for source in stdlib_inputs()]
    assert len(names) > 300
    assert names == sorted(set(names))
    assert {"argparse.py", "asyncio/base_events.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idlelib", "__pycache__"}
    assert {source.kind for source in stdlib_inputs()} == {"text"}


def test_folder_in_the_order_of_names(tmp_path: Path) -> None:
    fill(tmp_path, "b.txt", "sub/a.txt", "c.md")
    found = folder_inputs(tmp_path)
    assert [(source.name, source.path, source.size) for source in found] == [
        ("b.txt", tmp_path / "b.txt", 1),
        ("sub/a.txt", tmp_path / "sub/a.txt", 1),
    ]


@pytest.mark.parametrize(
    ("name", "document", "kind", "compression"),
    [
        ("a.txt", "file", "text", ""),
        ("a.txt", "line", "lines", ""),
        ("a.TXT.gz", "line", "lines", "gzip"),
        ("a.py", "line", "text", ""),
        ("a.md.zst", "file", "text", "zstd"),
        ("a.jsonl", "file", "json", ""),
        ("a.json", "line", "json", ""),
        ("a.ndjson.gz", "file", "json", "gzip"),
        ("a.jsonl.zst", "file", "json", "zstd"),
        ("a.parquet", "line", "parquet", ""),
        ("gz", "file", "text", ""),
    ],
)
def test_the_name_tells_the_format(tmp_path: Path, name: str, document: str, kind: str, compression: str) -> None:
    (source,) = named_inputs([str(fill(tmp_path, name) / name)], document)
    assert (source.kind, source.compression) == (kind, compression)


def test_patterns_keep_their_order_and_each_is_sorted(tmp_path: Path) -> None:
    fill(tmp_path, "b.md", "a.md", "z/deep/q.txt", "x[1].txt")
    patterns = [f"{tmp_path}/x[1].txt", f"{tmp_path}/**/q.txt", f"{tmp_path}/*.md"]
    assert [source.path.name for source in named_inputs(patterns)] == ["x[1].txt", "q.txt", "a.md", "b.md"]


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "sub/b.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for patterns in (["a.txt", "*.txt"], ["link.txt", "a.txt"], ["sub/b.txt", "sub/../sub/b.txt"]):
        with pytest.raises(DataError, match="is given twice"):
            named_inputs([f"{tmp_path}/{pattern}" for pattern in patterns])


def linked(folder: Path) -> Path:
    """Links of every kind: to files and folders, inside and outside, twice, in circles, and to nothing."""
    corpus = fill(folder / "corpus", "a.txt", "sub/b.txt", "sub/deep/c.txt", "d.md", ".hidden/e.txt")
    fill(folder / "disk", "f.txt", "more/g.txt")
    (corpus / "0-again.txt").symlink_to("a.txt")  # sorts first, but is not the name to use
    (corpus / "z.txt").symlink_to("d.md")  # matches by this name alone
    os.link(corpus / "sub/b.txt", corpus / "sub/hard.txt")
    (corpus / "disk").symlink_to(folder / "disk")
    (corpus / "disk2").symlink_to(folder / "disk")
    (corpus / "more").symlink_to(folder / "disk/more")
    (corpus / "sub/up").symlink_to("..")
    (corpus / "sub/deep/up").symlink_to(corpus)
    (folder / "disk/up").symlink_to(corpus)
    (corpus / "gone.txt").symlink_to(folder / "nowhere")
    (corpus / "unmounted").symlink_to(folder / "nowhere")
    (corpus / "round.txt").symlink_to("round.txt")
    os.mkfifo(corpus / "pipe.txt")
    return corpus


def test_links_are_followed_and_each_file_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = linked(tmp_path)
    found = folder_inputs(corpus)
    names = ["a.txt", "disk/f.txt", "disk/more/g.txt", "sub/b.txt", "sub/deep/c.txt", "z.txt"]
    assert [source.name for source in found] == [".hidden/e.txt", *names]
    [message] = caplog.messages
    assert "corpus: left out" in message and "pipe.txt (no plain file)" in message and "round.txt (" in message
    assert "gone.txt (No such file" in message and "unmounted (No such file" in message


def test_a_glob_follows_links_as_a_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below `**`, where links in a circle have no end."""
    corpus = linked(tmp_path)
    names = ["a.txt", "disk/f.txt", "disk/more/g.txt", "sub/b.txt", "sub/deep/c.txt", "z.txt"]
    assert [source.name for source in named_inputs([f"{corpus}/**/*.txt"])] == [f"{corpus}/{name}" for name in names]
    assert [source.name for source in named_inputs([f"{corpus}/*.txt"])] == [f"{corpus}/a.txt", f"{corpus}/z.txt"]
    assert [source.name for source in named_inputs([f"{corpus}/d*/**"])] == [
        f"{corpus}/disk/f.txt", f"{corpus}/disk/more/g.txt", f"{corpus}/disk/up/a.txt", f"{corpus}/disk/up/d.md",
        f"{corpus}/disk/up/sub/b.txt", f"{corpus}/disk/up/sub/deep/c.txt",
    ]  # fmt: skip
    monkeypatch.chdir(corpus)
    assert [source.name for source in named_inputs(["**/*.txt"])] == names
    assert [source.name for source in named_inputs(["s*/**/[cd].txt"])] == ["sub/deep/c.txt"]


def test_two_patterns_with_one_file_are_refused_by_hard_links_too(tmp_path: Path) -> None:
    corpus = linked(tmp_path)
    with pytest.raises(DataError, match="is given twice"):
        named_inputs([f"{corpus}/sub/b.txt", f"{corpus}/sub/hard.txt"])
    with pytest.raises(DataError, match="is given twice"):
        named_inputs([f"{corpus}/disk/*.txt", f"{tmp_path}/disk/**/*.txt"])


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is no plain file"):
        named_inputs([str(tmp_path / "pipe.txt")])
    with pytest.raises(DataError, match="no file matches"):
        folder_inputs(tmp_path)


def test_globs_of_a_folder_take_parts(tmp_path: Path) -> None:
    fill(tmp_path, "a/x/1.txt", "b/x/y/2.txt", "x/3.txt", "x/.txt")
    for pattern, names in {
        "x/*.txt": ["a/x/1.txt", "x/.txt", "x/3.txt"],
        "x/**/*.txt": ["a/x/1.txt", "b/x/y/2.txt", "x/.txt", "x/3.txt"],
        "[ab]/**/[0-9].txt": ["a/x/1.txt", "b/x/y/2.txt"],
    }.items():
        assert [source.name for source in folder_inputs(tmp_path, pattern)] == names, pattern


def test_errors_name_the_mistake(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        folder_inputs(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file matches '\*\.txt'"):
        folder_inputs(tmp_path)
    for pattern in ("/absolute", "", "../*.txt"):
        with pytest.raises(DataError, match="not a pattern relative"):
            folder_inputs(tmp_path, pattern)
    with pytest.raises(DataError, match=r"absent\*: no such file"):
        named_inputs([f"{tmp_path}/absent*"])
    with pytest.raises(DataError, match="is a folder: give it with --folder"):
        named_inputs([str(tmp_path)])
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"broken\.txt: cannot be read"):
        named_inputs([f"{tmp_path}/broken.txt"])
    with pytest.raises(DataError, match="compressed parquet"):
        named_inputs([str(fill(tmp_path, "a.parquet.gz") / "a.parquet.gz")])


def test_a_change_is_noticed(tmp_path: Path) -> None:
    (source,) = folder_inputs(fill(tmp_path, "a.txt"))
    source.check_unchanged()
    (tmp_path / "a.txt").write_bytes(b"xy")
    with pytest.raises(DataError, match=r"a\.txt changed"):
        source.check_unchanged()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        source.check_unchanged()
