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
        with whole_file(self.path) as file:
            for line, record in MetricsStream(self.path).lines():
                if record["step"] <= step and record.get("rollback", {}).get("number", 0) <= rollbacks:
                    file.write(line + b"\n")
        self.close()
        self._kept.clear()
        self._file = self._open()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        return open(self.path, "ab", buffering=0)


class MetricsStream:
    """The records of the metrics file `path`, in the order written, one at a time: a file may be larger than memory.

    A line torn at the end is left out, since the run may be on; cut_short says then that there is one. To iterate
    raises DataError when the file is missing or another line is no record.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.cut_short = False

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.lines())

    def lines(self) -> Iterator[tuple[bytes, Record]]:
        """Each line, without its end, and its record."""
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
    """All records at once. Raises as `MetricsStream`."""
    return list(MetricsStream(path))


def mean_later_windows(losses: Sequence[float | None]) -> float | None:
    """The mean loss of windows 2..K, those that memory can help; of the only window when K = 1.

    losses: one mean a window, None where no token has a target; the result is None when that is so everywhere.
    """
    later = [loss for loss in losses[min(1, len(losses) - 1) :] if loss is not None]
    return sum(later) / len(later) if later else None


def _parse(line: bytes) -> Record | None:
    """The record of a line, or None: an object's closing brace comes last, so a torn line never parses."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if is_record(record) else None


def _end_with_whole_line(path: Path) -> None:
    with open(path, "r+b") as file:
        last, end = b"", 0  # the last line and the place where it ends
        for last in file:
            end += len(last)
        if last.endswith(b"\n") or not last:
            return
        if _parse(last) is None:
            file.truncate(end - len(last))
        else:
            file.seek(end)
            file.write(b"\n")  # whole but for the newline, and perhaps of a step that will not be run again
