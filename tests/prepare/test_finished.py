"""A result that exists already: it is taken as it is, refused with the reason, or made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.finished import finished
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.job import Job, prepare


@pytest.fixture
def job(tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]) -> Job:
    return Job(named_inputs([str(write_jsonl(texts[:20]))]), tmp_path / "out", tokenizer, validation_share=0.3)


def test_without_a_result_one_must_be_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        assert finished(tmp_path / name, {}, False) is None


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file; name a folder"):
        finished(tmp_path / "file", {}, force)
    with pytest.raises(DataError, match="is not empty and not a prepared corpus; name another --out"):
        finished(tmp_path, {}, force)


def test_a_sound_result_of_the_same_settings_is_taken(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    report = prepare(job)
    assert finished(job.out, job.record(), False) == report
    assert capsys.readouterr().out.endswith("out is complete and was made with the same settings: nothing to do\n")
    assert finished(job.out, job.record(), True) is None


def test_other_settings_are_named_or_forced(job: Job) -> None:
    prepare(job)
    other = job.record() | {"validation_share": 0.4}
    with pytest.raises(DataError, match=r"other settings \(validation_share 0\.3, now 0\.4\); .* or use --force"):
        finished(job.out, other, False)
    assert finished(job.out, other, True) is None


def test_an_incomplete_result_is_refused_or_forced(job: Job) -> None:
    prepare(job)
    (job.out / "validation" / "index.json").unlink()
    with pytest.raises(DataError, match="; make it anew with --force"):
        finished(job.out, job.record(), False)
    assert finished(job.out, job.record(), True) is None
