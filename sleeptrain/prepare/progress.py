"""Progress of a preparation: a bar on a terminal, else a line a minute."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from sleeptrain.terminal import say

LINE_SECONDS = 60.0


class Progress(Protocol):
    def tick(self, documents: int, num_bytes: int) -> None:
        """Add documents and bytes of text that have been tokenised."""

    def advance(self, weight: int) -> None:
        """A unit of this weight is complete."""


@contextlib.contextmanager
def shown(units: int, weight: int) -> Iterator[Progress]:
    """Show progress on standard error while the block runs. weight: of all `units` units together."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(_Counts(units, weight))
        return
    columns = (BarColumn(), TextColumn("{task.percentage:.0f}% {task.description}"), TimeRemainingColumn())
    with RichProgress(*columns, console=console) as bar:
        yield _Bar(_Counts(units, weight), bar)


class _Counts:
    """Counts of the work done by this call."""

    def __init__(self, units: int, weight: int) -> None:
        self.units, self.weight = units, weight
        self.units_done = self.weight_done = self.documents = self.num_bytes = 0
        self._start = time.monotonic()

    def __str__(self) -> str:
        speed = self.num_bytes / max(time.monotonic() - self._start, 1e-3)
        return (
            f"{self.units_done}/{self.units} units, {self.documents:,} documents, "
            f"{self.num_bytes / 1e6:,.1f} MB, {speed / 1e6:.1f} MB/s"
        )


class _Lines:
    def __init__(self, counts: _Counts) -> None:
        self._counts = counts
        self._last = time.monotonic()

    def tick(self, documents: int, num_bytes: int) -> None:
        self._counts.documents += documents
        self._counts.num_bytes += num_bytes
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            say(f"tokenizing: {self._counts}", sys.stderr, flush=True)

    def advance(self, weight: int) -> None:
        self._counts.units_done += 1


class _Bar:
    def __init__(self, counts: _Counts, bar: RichProgress) -> None:
        self._counts, self._bar = counts, bar
        self._task = bar.add_task("tokenizing", total=max(counts.weight, 1))

    def tick(self, documents: int, num_bytes: int) -> None:
        self._counts.documents += documents
        self._counts.num_bytes += num_bytes
        self._bar.update(self._task, description=str(self._counts))

    def advance(self, weight: int) -> None:
        self._counts.units_done += 1
        self._bar.update(self._task, advance=weight, description=str(self._counts))
