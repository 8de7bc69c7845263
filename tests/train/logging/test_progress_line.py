"""The lines that a run prints, with and without a terminal."""

import io
import re
import sys

import pytest

from sleeptrain.train.logging.progress_line import ProgressLine
from tests.hostile import HOSTILE, is_harmless

RECORD = {
    "step": 1200,
    "tokens": 12_345_678,
    "loss": 2.34567,
    "lr": 0.002,
    "passes": 4,
    "window": 128,
    "batch": 8,
    "grad_norm": 0.731,
    "tokens_per_second": 4321.0,
    "passes_per_second": 12.34,
    "mfu": 0.4321,
    "memory_mb": 2048.0,
    "eta_seconds": 93784.2,
    "time": 0.0,
}
EVALUATION = {"step": 1200, "tokens": 1, "eval": {"loss": {"1": [3.0, 2.0, None], "4": [3.0, 1.5, 1.0]}}, "time": 0.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = ProgressLine(100_000_000, stream)
    progress.update(RECORD)
    assert stream.getvalue() == (
        "step 1200 | 12.3M/100M tokens (12%) | loss 2.3457 | lr 0.002 | N 4 | L 128 | grad 0.731 | 4.32k tok/s | "
        "12.3 passes/s | MFU 43.2% | 2.0 GiB | ETA 1d 02:03:04\n"
    )
    progress.message("saved")
    progress.close()
    assert stream.getvalue().splitlines()[1:] == ["saved"]
    assert "\x1b" not in stream.getvalue()


def test_unknown_values_are_omitted() -> None:
    stream = io.StringIO()
    ProgressLine(1000, stream).update({"step": 1, "tokens": 64, "loss": float("nan"), "mfu": None, "eta_seconds": None})
    assert stream.getvalue() == "step 1 | 64/1.00k tokens (6%) | loss nan\n"


def test_evaluations_show_later_windows_for_each_number_of_passes() -> None:
    stream = io.StringIO()
    progress = ProgressLine(1000, stream)
    progress.update(EVALUATION)
    progress.update({"step": 2, "eval": {"loss": {"1": [None], "2": [0.5]}, "accuracy": {"2": 0.25}}})
    assert stream.getvalue().splitlines() == [
        "step 1200 | evaluation | N=1 loss 2.0000 (windows 2-3) | N=4 loss 1.2500 (windows 2-3)",
        "step 2 | evaluation | N=1 loss - (window 1) | N=2 loss 0.5000 (window 1) | N=2 accuracy 25.0%",
    ]


def test_a_terminal_keeps_one_line_in_place(terminal: Terminal) -> None:
    progress = ProgressLine(100_000_000, terminal)
    for step in range(1, 6):
        progress.update(RECORD | {"step": step})
    written = terminal.getvalue()
    assert all(f"step {step} | " in written for step in range(1, 6))
    assert "\n" not in written  # rewritten in place
    progress.message("[bold]not markup[/bold]")
    progress.update(EVALUATION)
    progress.close()
    progress.close()
    lines = terminal.getvalue().splitlines()
    assert any(line.endswith("[bold]not markup[/bold]") for line in lines)
    assert terminal.getvalue().count("evaluation") == 1
    assert sys.stdout is not terminal and "\x1b[?25h" in terminal.getvalue()  # the cursor is back


def test_a_narrow_terminal_cuts_the_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    progress = ProgressLine(100_000_000, terminal)
    progress.update(RECORD)
    assert "step 1200" in terminal.getvalue() and "ETA" not in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    progress.close()


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(10).message("here")
    captured = capsys.readouterr()
    assert captured.err == "here\n" and captured.out == ""


def test_a_message_is_text_and_nothing_more(terminal: Terminal) -> None:
    """It holds no markup, no escape sequence and no credentials."""
    text = f"[red]{HOSTILE}[/red] https://me:hush@host"
    for stream in (io.StringIO(), terminal):
        progress = ProgressLine(1000, stream)
        progress.message(text)
        progress.close()
        shown = stream.getvalue()
        assert "[red]\\x1b]0;owned\\x07" in shown and "[/red] https://***@host" in shown
    assert is_harmless(re.sub(r"\x1b\[[?0-9]*[a-zA-Z]|\r", "", shown)), "but for what the live line needs itself"
