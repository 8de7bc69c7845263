"""A report is written over an older one, and over nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.errors import DataError
from sleeptrain.report.write import check_out, write_report
from tests.report.made import accuracy, evaluation, make_run, step


@pytest.mark.slow
def test_a_report_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_run(tmp_path / "a" / "r", [], [step(1), accuracy(1, 0.5)])
    make_run(tmp_path / "b" / "r", ["experiment=depo_small"], [step(1)])
    assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 0
    assert main(["report", str(tmp_path / "b"), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"index.html", "depo-training-loss.png", "depo-run.png"}
    (out / "notes.txt").write_text("mine")
    assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 2
    assert {path.name for path in out.iterdir()} == names | {"notes.txt"}


def test_only_a_report_is_written_over_and_only_its_own_pictures_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a" / "r", [], [step(1)])
    make_run(tmp_path / "b" / "r", ["experiment=depo_small"], [step(1)])
    out = tmp_path / "out"
    out.mkdir()
    mine = out / "rule110-mine.png"
    mine.write_bytes(b"a picture")
    for index in (None, "<html>mine</html>"):
        if index:
            (out / "index.html").write_text(index)
        assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 2
        assert "no part of a report" in capsys.readouterr().err and mine.exists()
    (out / "index.html").unlink()
    mine.unlink()
    assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 0
    mine.write_bytes(b"a picture")
    assert main(["report", str(tmp_path / "b"), "--out", str(out)]) == 0
    names = {"index.html", "depo-training-loss.png", "depo-run.png", mine.name}
    assert {path.name for path in out.iterdir()} == names


def test_names_of_held_out_sets_are_no_folders(tmp_path: Path) -> None:
    sets = {"web/en": {"loss": {"1": [3.0, 2.0]}}}
    text = ["experiment=stdlib", "sleep.curriculum=[]", "data.sequence=256", "model.vocab_size=300"]
    make_run(tmp_path / "r", text, [step(1), evaluation(1, {"1": [3.0, 2.0]}, sets=sets)])
    for _ in range(2):
        assert main(["report", str(tmp_path / "r")]) == 0
    assert "shards-loss-web%2Fen.png" in {path.name for path in (tmp_path / "r" / "report").iterdir()}


def test_a_folder_of_others_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    check_out(tmp_path / "absent")
    (tmp_path / ".hidden").touch()
    check_out(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file, which is no part of a report; name another folder"):
        check_out(tmp_path)
    with pytest.raises(DataError, match="is a file; name a folder for the report"):
        check_out(tmp_path / "file")


def test_a_report_without_runs_is_its_page(tmp_path: Path) -> None:
    written = write_report([], ["a: gone"], tmp_path / "out", "title")
    assert written == tmp_path / "out" / "index.html" and "a: gone" in written.read_text()
    assert [path.name for path in written.parent.iterdir()] == ["index.html"]
    check_out(written.parent)
