"""The options that select text give files; the message about a senseless one names the option."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from sleeptrain.errors import DataError
from sleeptrain.prepare.options import add_input_options, inputs_of


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_input_options(parser)
    return parser.parse_args(words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.md", "c.txt"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_and_its_pattern(folder: Path) -> None:
    assert [source.name for source in inputs_of(parsed("--folder", str(folder)))] == ["a.txt", "c.txt"]
    assert [source.name for source in inputs_of(parsed("--folder", str(folder), "--glob", "*.md"))] == ["b.md"]


def test_files_keep_their_order(folder: Path) -> None:
    options = parsed("--input", f"{folder}/c.txt", f"{folder}/[ab].*", "--document", "line")
    found = inputs_of(options)
    assert [(source.path.name, source.kind) for source in found] == [
        ("c.txt", "lines"),
        ("a.txt", "lines"),
        ("b.md", "text"),
    ]


def test_the_standard_library() -> None:
    assert "argparse.py" in {source.name for source in inputs_of(parsed("--stdlib"))}


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan"])
def test_a_share_that_leaves_a_side_empty_is_refused(share: str) -> None:
    with pytest.raises(DataError, match=r"--validation-share \S+: must lie between 0 and 1"):
        inputs_of(parsed("--stdlib", f"--validation-share={share}"))


def test_no_document_has_no_bytes() -> None:
    with pytest.raises(DataError, match="--max-document-bytes 0: must be at least 1"):
        inputs_of(parsed("--stdlib", "--max-document-bytes", "0"))


@pytest.mark.parametrize("words", [[], ["--stdlib", "--folder", "x"], ["--stdlib", "--document", "page"]])
def test_one_kind_of_source_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
    assert "error: " in capsys.readouterr().err
