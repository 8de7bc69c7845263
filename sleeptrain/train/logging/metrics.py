"""The record of a run: JSON lines, one a record, each with its `step`. It is what plots and reports read."""

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


class MetricsFile:
    """`path`, open for appending. A line that a kill left torn at the end is dropped when the file is opened.

    What the disk does not take is kept, and tried again with the next record. `sync` may be called from a thread.
    failed: why the disk does not take records at the moment; None where it does.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if self.path.exists():
            _end_with_whole_line(self.path)
        self._file = self._open()
        self._kept, self._lock = bytearray(), threading.Lock()
        self.failed: str | None = None

    def append(self, record: Record) -> None:
        """Writes one record, in the file when this returns (on the disk after `sync`) if the disk takes it.

        Floats are written as Python's shortest repr, so that they read back exactly; NaN and infinities as NaN and
        Infinity. Raises ValueError for a record without an integer `step`, TypeError for what JSON cannot hold.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs an integer step: {record}")
        with self._lock:
            self._kept += json.dumps(record).encode() + b"\n"
            try:
                self._write()
            except OSError as error:
                self.failed = error.strerror

    def sync(self) -> None:
        """Waits until the disk has every record: call before a checkpoint that counts on them. Raises OSError."""
        with self._lock:
            self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        while self._kept:  # unbuffered: one write as a rule, more only when the disk takes part of it
            del self._kept[: self._file.write(self._kept)]
        self.failed = None

    def truncate_after(self, step: int, rollbacks: int) -> None:
        """Drops all records of later steps than `step`, and of later rollbacks, which a run that goes on writes again.

        rollbacks: how many the run has had. The file is replaced as a whole, and what the disk has not taken yet is
        dropped. Raises DataError for a line that is no record.
        """
        kept = [
            line
            for line, record in _lines(self.path)
            if record["step"] <= step and record.get("rollback", {}).get("number", 0) <= rollbacks
        ]
        self.close()
        self._kept.clear()
        with whole_file(self.path) as file:
            file.writelines(line + b"\n" for line in kept)
        self._file = self._open()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        return open(self.path, "ab", buffering=0)


def stream_metrics(path: Path | str) -> Iterator[Record]:
    """The records of a metrics file, in the order written; a line torn at the end (the run may be on) is left out.

    Raises DataError when the file is missing or another line is no record.
    """
    return (record for _, record in _lines(Path(path)))


def read_metrics(path: Path | str) -> list[Record]:
    """All records at once. Raises as `stream_metrics`."""
    return list(stream_metrics(path))


def mean_later_windows(losses: Sequence[float | None]) -> float | None:
    """The mean loss of windows 2..K, those that memory can help; of the only window when K = 1.

    losses: one mean a window, None where no token has a target; the result is None when that is so everywhere.
    """
    later = [loss for loss in losses[min(1, len(losses) - 1) :] if loss is not None]
    return sum(later) / len(later) if later else None


def _lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Each line, without its end, and its record: one at a time, for files may be larger than memory."""
    require_plain(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parse(line)
                if record is not None:
                    yield line.removesuffix(b"\n"), record
                elif line.endswith(b"\n"):
                    raise DataError(f"metrics file {path}, line {number} is no record; remove that line or the file")
    except OSError as error:
        raise DataError(f"metrics file {path} cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None: an object's closing brace comes last, so a torn line never parses."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if is_record(record) else None


def _end_with_whole_line(path: Path) -> None:
    with open(path, "r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return
        if _parse(content[end:]) is None:
            file.truncate(end)
        else:
            file.write(b"\n")  # whole but for the newline, and perhaps of a step that will not be run again
