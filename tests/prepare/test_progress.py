from __future__ import annotations

import io

import pytest
from rich.console import Console

from sleeptrain.prepare import progress


def run() -> None:
    with progress.shown(3, 100) as shown:
        shown.tick(10, 5_000_000)
        shown.advance(40)
        shown.tick(1234, 2_000_000)


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("tokenizing: 0/3 units, 10 documents, 5.0 MB, ")
    assert lines[1].startswith("tokenizing: 1/3 units, 1,244 documents, 7.0 MB, ")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=file, force_terminal=True, width=120))
    run()
    assert "40% 1/3 units, 1,244 documents, 7.0 MB" in file.getvalue()
