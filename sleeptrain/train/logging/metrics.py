"""The records of a run: a file of JSON lines, each with its `step`. Plots and reports read it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from sleeptrain.errors import DataError
from sleeptrain.files import whole_file
from sleeptrain.plain_files import require_plain
from sleeptrain.small_files import parse_json
from sleeptrain.train.logging.record_schema import is_record

METRICS = "metrics.jsonl"
Record = dict[str, Any]


def position(step: int, tokens: int, flops: int | None, time: float) -> Record:
    """The fields of every record.

    flops: model FLOPs of all steps so far; None if unknown, and the record then has none. time: Unix seconds.
    """
    fields = {"step": step, "tokens": tokens, "time": time}
    return fields if flops is None else fields | {"flops": flops}


class MetricsFile:
    """The metrics file `path`, open for appending. Opening drops a torn last line, which a killed process leaves.

    Records that cannot be written stay in memory and are written with the next record. Another thread may call `sync`.
    failed: the error of the last write; None if it succeeded.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if self.path.exists():
            _end_with_whole_line(self.path)
        self._file = self._open()
        self._unwritten, self._lock = bytearray(), threading.Lock()
        self.failed: str | None = None

    def append(self, record: Record) -> None:
        """Write one record. Unless the write fails, it is in the file on return, and on the disk after `sync`.

        Floats are written as Python's shortest repr, which reads back exactly; NaN and infinities as NaN and Infinity.
        Raises ValueError for a record without an integer `step`, TypeError for a value that JSON cannot hold.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs an integer step: {record}")
        with self._lock:
            self._unwritten += json.dumps(record).encode() + b"\n"
            try:
                self._write()
            except OSError as error:
                self.failed = error.strerror

    def sync(self) -> None:
        """Wait until all records are on the disk: call it before a checkpoint that relies on them. Raises OSError."""
        with self._lock:
            self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        while self._unwritten:  # the file is unbuffered, and a write may be partial
            del self._unwritten[: self._file.write(self._unwritten)]
        self.failed = None

    def truncate_after(self, step: int, rollbacks: int) -> None:
        """Drop the records of steps after `step`, and of rollbacks after number `rollbacks`: the run writes them again.

        rollbacks: the number of rollbacks so far. The file is replaced atomically, and records that are not written yet
        are dropped. Raises DataError for a line that is no record.
        """
        with whole_file(self.path) as file:
            for line, record in MetricsStream(self.path).lines():
                if record["step"] <= step and record.get("rollback", {}).get("number", 0) <= rollbacks:
                    file.write(line + b"\n")
        self.close()
        self._unwritten.clear()
        self._file = self._open()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        return open(self.path, "ab", buffering=0)


class MetricsStream:
    """The records of the metrics file `path` in file order, one at a time: a file may be larger than memory.

    A torn last line is skipped, since the run may be writing it; `cut_short` is then True. Iteration raises DataError
    if the file is missing or another line is no record.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.cut_short = False

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.lines())

    def lines(self) -> Iterator[tuple[bytes, Record]]:
        """Yield each line without its newline, and its record."""
        require_plain(self.path)
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    record = _parse(line)
                    if record is not None:
                        yield line.removesuffix(b"\n"), record
                    elif line.endswith(b"\n"):
                        raise DataError(
                            f"metrics file {self.path}, line {number} is no record; remove that line or the file"
                        )
                    else:
                        self.cut_short = True
        except OSError as error:
            raise DataError(f"metrics file {self.path} cannot be read: {error.strerror}") from error


def read_metrics(path: Path | str) -> list[Record]:
    """Return all records. Raises as `MetricsStream`."""
    return list(MetricsStream(path))


def mean_later_windows(losses: Sequence[float | None]) -> float | None:
    """The mean loss of windows 2..K, in which memory can help; of the only window if K = 1.

    losses: the mean of each window, None for a window without targets. None if no window has targets.
    """
    later = [loss for loss in losses[min(1, len(losses) - 1) :] if loss is not None]
    return sum(later) / len(later) if later else None


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None if it is no record. A torn line never parses: it lacks the closing brace."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if is_record(record) else None


def _end_with_whole_line(path: Path) -> None:
    with open(path, "r+b") as file:
        last, end = b"", 0  # the last line and its end
        for last in file:
            end += len(last)
        if last.endswith(b"\n") or not last:
            return
        if _parse(last) is None:
            file.truncate(end - len(last))
        else:
            file.seek(end)
            file.write(b"\n")  # the record is complete, and its step may not be run again
