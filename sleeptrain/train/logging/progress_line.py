"""The output of a running training: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sleeptrain.terminal import say, shown
from sleeptrain.train.logging.metrics import mean_later_windows

SEPARATOR = " | "


class ProgressLine:
    """Shows the records of a run.

    total_tokens: the tokens seen at the end of the run. stream: default stderr.
    On a terminal the newest training record is one line that is rewritten in place and cut at the right edge;
    evaluations and messages scroll above it. Elsewhere (in a batch job's log) each is a line, flushed.
    """

    def __init__(self, total_tokens: int, stream: TextIO | None = None):
        self._total_tokens = total_tokens
        self._stream = stream or sys.stderr
        console = Console(file=self._stream, highlight=False)
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Redrawn on `update` only, so that no thread wakes up during training.
            self._live = Live(Text(), console=console, auto_refresh=False)
            self._live.start()

    def update(self, record: dict[str, Any]) -> None:
        """Show a record of the metrics file if it is of training or (with `eval`) of an evaluation."""
        if "eval" in record:
            self.message(evaluation_line(record))
        elif "loss" not in record:
            return
        elif self._live is None:
            self.message(training_line(record, self._total_tokens))
        else:
            line = Text(training_line(record, self._total_tokens), no_wrap=True, overflow="crop")
            self._live.update(line, refresh=True)

    def message(self, text: str) -> None:
        if self._live is None:
            say(text, self._stream, flush=True)
        else:
            self._live.console.print(Text(shown(text)))

    def close(self) -> None:
        """Stop updates; the last line stays on the terminal. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def training_line(record: dict[str, Any], total_tokens: int) -> str:
    """One line for a training record, without values that are missing or None (an MFU without a known peak)."""
    fields = [f"step {record['step']}", _tokens(record["tokens"], total_tokens)]
    fields += [show(record[key]) for key, show in _FIELDS.items() if record.get(key) is not None]
    return SEPARATOR.join(fields)


def evaluation_line(record: dict[str, Any]) -> str:
    """One line with the mean loss of windows 2..K (`mean_later_windows`) and any accuracy, by number of passes."""
    fields = [f"step {record['step']}", "evaluation"]
    for passes, losses in record["eval"]["loss"].items():
        mean = mean_later_windows(losses)
        windows = f"windows 2-{len(losses)}" if len(losses) > 1 else "window 1"
        fields.append(f"N={passes} loss {'-' if mean is None else format(mean, '.4f')} ({windows})")
    for passes, accuracy in record["eval"].get("accuracy", {}).items():
        fields.append(f"N={passes} accuracy {100 * accuracy:.1f}%")
    return SEPARATOR.join(fields)


def _tokens(done: int, total: int) -> str:
    share = f" ({100 * done / total:.0f}%)" if total else ""
    return f"{_count(done)}/{_count(total)} tokens{share}"


def _count(number: float) -> str:
    """A number in at most five characters: 950, 12.3k, 4.56M, 1.40B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{2 if number < 10 * size else 1 if number < 100 * size else 0}f}{unit}"
    return f"{number:.0f}"


def _rate(number: float) -> str:
    return _count(number) if number >= 1000 else f"{number:.3g}"


def _memory(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GiB" if megabytes >= 1024 else f"{megabytes:.0f} MiB"


def duration_text(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


# Record key -> its text. The most important come first: a narrow terminal cuts the line.
_FIELDS: dict[str, Callable[[Any], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "lr": lambda x: f"lr {x:.3g}",
    "passes": lambda x: f"N {x}",
    "window": lambda x: f"L {x}",
    "grad_norm": lambda x: f"grad {x:.3g}",
    "tokens_per_second": lambda x: f"{_rate(x)} tok/s",
    "passes_per_second": lambda x: f"{_rate(x)} passes/s",
    "mfu": lambda x: f"MFU {100 * x:.1f}%",
    "memory_mb": _memory,
    "eta_seconds": lambda x: f"ETA {duration_text(x)}",
}
