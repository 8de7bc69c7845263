from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import Tokenizer
from tests.data.texts import make_texts
from tools.prepare import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(make_texts(60)):
        (folder / f"{index:02d}.txt").write_text(text)
    return folder


def call(folder: Path, out: Path, *more: str, vocab_size: int = 320) -> int:
    return main(["--folder", str(folder), "--out", str(out), "--vocab-size", str(vocab_size), *more])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_makes_everything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(folder, out) == 0
    tokenizer = Tokenizer(out / "tokenizer.model")
    sides = [TokenShards(out / side, expect_tokenizer=tokenizer.hash) for side in ("train", "validation")]
    texts = [tokenizer.decode(side.document(index).tolist()) for side in sides for index in range(side.num_documents)]
    assert sorted(texts) == sorted(make_texts(60))
    report = json.loads((out / "prepared.json").read_text())["report"]
    assert [report[side]["documents"] for side in ("train", "validation")] == [side.num_documents for side in sides]
    assert f"tokens {sides[0].num_tokens:,}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_second_call_changes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(folder, out) == 0
    before = snapshot(out)
    assert call(folder, out) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(out) == before


def test_other_settings_are_refused_or_forced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(folder, out) == 0
    before = snapshot(out)
    assert call(folder, out, vocab_size=330) == 2
    assert "vocab_size 320, now 330" in capsys.readouterr().err
    (folder / "00.txt").write_text("changed text")
    assert call(folder, out) == 2
    assert "corpus_sha256" in capsys.readouterr().err
    assert snapshot(out) == before
    assert call(folder, out, "--force", vocab_size=330) == 0
    assert Tokenizer(out / "tokenizer.model").vocab_size == 330


def test_damage_is_refused_or_forced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(folder, out) == 0
    (out / "train" / "shard-000000.tar").unlink()
    assert call(folder, out) == 2
    assert "--force" in capsys.readouterr().err
    assert call(folder, out, "--force") == 0
    TokenShards(out / "train")


def test_somebody_elses_folder_survives_even_force(folder: Path, tmp_path: Path) -> None:
    before = snapshot(folder)
    assert call(folder, folder, "--force") == 2
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "100"], "vocab_size 100 is too small"),
        (["--vocab-size", "9000"], "vocab_size 9000 is too large"),
        (["--glob", "*.rst"], "no file matches"),
        (["--max-documents", "1"], "--max-documents 1"),
        (["--validation-share", "1.5"], "--validation-share 1.5"),
        (["--folder", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--folder", str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare: ") and message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_killed_between_the_sides_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.prepare.write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_stdlib(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--stdlib", "--out", str(out), "--vocab-size", "512", "--max-documents", "12"]) == 0
    assert TokenShards(out / "train").num_documents + TokenShards(out / "validation").num_documents == 12
