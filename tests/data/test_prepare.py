from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.test_hf_tokenizer import EOS, OTHER, make
from tests.data.texts import make_texts
from tests.prepare.documents import all_documents
from tools.prepare import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(make_texts(60)):
        (folder / f"{index:02d}.txt").write_text(text)
    return folder


def call(folder: Path, out: Path, *more: str, vocab_size: int = 320) -> int:
    return main(["--folder", str(folder), "--out", str(out), "--vocab-size", str(vocab_size), "--workers", "1", *more])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_call_makes_all_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(folder, out) == 0
    tokenizer = load_tokenizer(out / "tokenizer.model")
    sides = [TokenShards(out / side, expect_tokenizer=tokenizer.hash) for side in ("train", "validation")]
    texts = [tokenizer.decode(tokens) for side in sides for tokens in all_documents(side)]
    assert sorted(texts) == sorted(make_texts(60))
    report = json.loads((out / "prepared.json").read_text())["report"]
    assert [report[side]["documents"] for side in ("train", "validation")] == [side.num_documents for side in sides]
    output = capsys.readouterr().out
    assert f"tokens {sides[0].num_tokens:,}" in output and "empty 0  bad 0" in output
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
    assert "inputs_sha256" in capsys.readouterr().err
    assert snapshot(out) == before
    assert call(folder, out, "--force", vocab_size=330) == 0
    assert load_tokenizer(out / "tokenizer.model").vocab_size == 330


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
        (["--validation-share", "1e-9", "--vocab-size", "320"], "set a larger one"),
        (["--workers", "0"], "--workers 0"),
        (["--tokenizer", "absent.model"], "absent.model"),
        (["--eos-token", "x"], "go with --tokenizer only"),
        (["--folder", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    workers = [] if "--workers" in arguments else ["--workers", "1"]
    assert main(["--folder", str(folder), "--out", str(tmp_path / "out"), *workers, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare: ") and message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_an_interrupted_call_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sleeptrain.prepare.job.assemble", interrupted)
        assert call(folder, tmp_path / "out") == 130
    assert "the same call goes on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "texts"]
    assert call(folder, tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_an_existing_sentencepiece_model_is_used_and_copied(folder: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(make_texts(40, seed=3), 300, tmp_path / "elsewhere.model")
    arguments = ["--folder", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--tokenizer", str(tmp_path / "elsewhere.model")]) == 0
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (tmp_path / "elsewhere.model").read_bytes()
    TokenShards(tmp_path / "out/train", expect_tokenizer=tokenizer.hash)


def test_a_hugging_face_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "99.txt").write_text(f"a text that spells {EOS} and {OTHER}")
    arguments = ["--folder", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    arguments += ["--tokenizer", str(make(tmp_path / "hf"))]
    assert main(arguments) == 2
    assert "--eos-token" in capsys.readouterr().err
    arguments += ["--eos-token", OTHER]
    assert main(arguments) == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    found = []
    for side in ("train", "validation"):
        shards = TokenShards(tmp_path / "out" / side, expect_tokenizer=tokenizer.hash)
        documents = [tokens.tolist() for tokens in all_documents(shards)]
        assert all(document.index(2) == len(document) - 1 for document in documents)
        found += [tokenizer.decode(document) for document in documents]
    assert sorted(found) == sorted([*make_texts(60), f"a text that spells {EOS} and {OTHER}"])
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--bos-token", EOS]) == 2
    assert "tokenizer_sha256" in capsys.readouterr().err


def test_bad_documents_are_refused_or_skipped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "07.txt").write_bytes(b"\xff\xfe")
    (folder / "08.txt").write_bytes(b"")
    assert call(folder, tmp_path / "out") == 2
    assert "07.txt: not UTF-8" in capsys.readouterr().err
    assert call(folder, tmp_path / "out", "--on-bad-document", "skip") == 0
    output = capsys.readouterr().out
    assert "empty 1  bad 1" in output and "07.txt: not UTF-8" in output


def test_inputs_of_several_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in make_texts(40)))
    (tmp_path / "b.txt").write_text("one line\nand another\n\n")
    arguments = ["--input", f"{tmp_path}/*.jsonl", f"{tmp_path}/b.txt", "--out", str(tmp_path / "out")]
    arguments += ["--text-field", "body", "--document", "line", "--workers", "1", "--vocab-size", "300"]
    assert main([*arguments, "--validation-share", "0.3"]) == 0
    report = json.loads((tmp_path / "out/prepared.json").read_text())["report"]
    assert report["train"]["documents"] + report["validation"]["documents"] == 42
    assert report["empty"] == 1


def test_stdlib(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--stdlib", "--out", str(out), "--vocab-size", "512", "--max-documents", "12", "--workers", "1"]
    assert main([*arguments, "--validation-share", "0.3"]) == 0
    assert TokenShards(out / "train").num_documents + TokenShards(out / "validation").num_documents == 12
