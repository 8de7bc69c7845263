"""Tokenise a unit of text to shards, and the worker process that does this for one unit after another."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from sleeptrain.data.shard_index import token_dtype
from sleeptrain.data.shard_writer import ShardWriter
from sleeptrain.data.tokenizer import Tokenizer, load_tokenizer
from sleeptrain.errors import DataError, UserError
from sleeptrain.files import staged_folder
from sleeptrain.prepare.readers import Bad, documents, locate
from sleeptrain.prepare.report import UnitReport
from sleeptrain.prepare.split import SIDES, side
from sleeptrain.prepare.units import Slice, Unit

REPORT = "report.json"
TICK_SECONDS = 0.5

Tick = Callable[[int, int], None]  # documents and bytes of text tokenised since the last call


@dataclass(frozen=True)
class Recipe:
    """Settings common to all units.

    folder: of the units. tokenizer: file or folder. The others: see `Job`.
    """

    folder: Path
    tokenizer: Path
    text_field: str
    validation_share: float
    shard_bytes: int
    skip_bad: bool
    max_document_bytes: int


@dataclass(frozen=True)
class Task:
    """A unit to tokenise. limit: only its first documents; None: all."""

    unit: Unit
    limit: int | None = None


def unit_folder(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def tokenise_unit(task: Task, recipe: Recipe, tokenizer: Tokenizer, tick: Tick) -> UnitReport:
    """Write the folder of a unit (shards of each side, report), complete or not at all, and return the report.

    The same unit gives the same bytes; an existing folder is replaced. Raises DataError if a file cannot be read, has
    changed, or has a bad document and `recipe.skip_bad` is False.
    """
    report = UnitReport(max_document_bytes=recipe.max_document_bytes)
    ticker = _Ticker(tick)
    with staged_folder(unit_folder(recipe.folder, task.unit.number), replace=True) as staged:
        writers = {name: _writer(staged / name, tokenizer, recipe.shard_bytes) for name in SIDES}
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        dtype = token_dtype(tokenizer.vocab_size)
        for number, text in enumerate(islice(_texts(task, recipe, report), task.limit)):
            name = side(text, recipe.validation_share)
            tokens = np.array([*first, *tokenizer.encode(text), tokenizer.eos_id], dtype)
            writers[name].add(f"{task.unit.number:06d}-{number:08d}", tokens)
            num_bytes = len(text.encode())
            report.sides[name].add(len(tokens), num_bytes)
            ticker.add(num_bytes)
        for name, writer in writers.items():
            report.sides[name].shards = writer.close()
        (staged / REPORT).write_bytes(report.to_json())
    ticker.flush()
    return report


def _writer(folder: Path, tokenizer: Tokenizer, shard_bytes: int) -> ShardWriter:
    folder.mkdir()
    return ShardWriter(folder, token_dtype(tokenizer.vocab_size), shard_bytes)


def _texts(task: Task, recipe: Recipe, report: UnitReport) -> Iterator[str]:
    """The documents of a unit. Counts empty and bad documents in `report`."""
    for part in task.unit.slices:
        part.source.check_unchanged()
        for text in documents(part, recipe.text_field, recipe.max_document_bytes):
            if isinstance(text, Bad):
                _leave_out(text, part, recipe, report)
            elif not text.strip():
                report.empty += 1
            else:
                yield text
        part.source.check_unchanged()


def _leave_out(bad: Bad, part: Slice, recipe: Recipe, report: UnitReport) -> None:
    if not recipe.skip_bad or report.first_bad is None:
        message = f"{locate(part, bad)}: {bad.reason}"
        if not recipe.skip_bad:
            raise DataError(f"{message}; mend it or leave such documents out with --on-bad-document skip")
        report.first_bad = message
    report.bad += 1


class _Ticker:
    """Collects counts and reports them every TICK_SECONDS, not at every document."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self._documents = self._bytes = 0
        self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._documents += 1
        self._bytes += num_bytes
        if time.monotonic() - self._last >= TICK_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._tick(self._documents, self._bytes)
        self._documents = self._bytes = 0
        self._last = time.monotonic()


def serve(connection: Connection, recipe: Recipe) -> None:
    """Run a worker process. It receives tasks, and None to end, and sends ("tick" | "done" | "failed", content)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole process group; the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        tokenizer = load_tokenizer(recipe.tokenizer)
        while (task := connection.recv()) is not None:
            report = tokenise_unit(task, recipe, tokenizer, lambda *counts: connection.send(("tick", counts)))
            connection.send(("done", report))
    except UserError as error:
        connection.send(("failed", str(error)))
    except OSError as error:
        connection.send(("failed", f"{error.filename or recipe.folder}: {error.strerror}"))


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
