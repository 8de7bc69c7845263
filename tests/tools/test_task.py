"""tools/task.py shows the questions of a task."""

from __future__ import annotations

import re
import sys

import pytest
import task as tool


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(tool, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["task.py", *arguments])
    return tool.main()


@pytest.mark.parametrize("held_out", [[], ["--held-out"]])
def test_rows_and_lines_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held_out: list[str]
) -> None:
    assert run(monkeypatch, "experiment=depo_small", "--rows", "3", *held_out) == 0
    *shown, sizes, guessing, rate = capsys.readouterr().out.splitlines()
    assert len(shown) == 6 and all(re.match(r"  targets: = \d+", line) for line in shown[1::2])
    assert all(len(set(re.findall(r"[+]\d:", line))) > 0 for line in shown[::2])
    assert sizes == "54 ids, rows of 36 tokens, 1024 held out"
    assert guessing == "guessing: nodes_accuracy 0.0909, nodes_loss 1.1989" and "rows a second" in rate


def test_rows_are_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["experiment=depo_small", "data.depo.validation_samples=2"]
    assert run(monkeypatch, *few, "--rows", "9", "--held-out") == 0
    assert capsys.readouterr().out.count("  targets: ") == 2
    with pytest.raises(SystemExit):
        run(monkeypatch, *few, "--rows", "0")
    assert "--rows must be at least 1" in capsys.readouterr().err


def test_text_is_no_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "experiment=stdlib") == 2
    assert "data.source=shards is no task" in capsys.readouterr().err
