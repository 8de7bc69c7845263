"""Read the documents of a slice one by one. The memory this takes does not grow with the file."""

from __future__ import annotations

import itertools
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import Source
from sleeptrain.prepare.parquet import rows
from sleeptrain.prepare.units import Slice
from sleeptrain.prepare.unpack import CHUNK_BYTES, unpacked

MAX_DOCUMENT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Bad:
    """An entry of a file that is no valid document.

    reason: why. place: its line in the slice, or its row in the parquet file, from 1; 0 if the file is one document.
    """

    reason: str
    place: int = 0


def documents(part: Slice, text_field: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> Iterator[str | Bad]:
    """The texts of a slice, in order and unchanged: line ends inside a document stay.

    A document with more than `max_bytes` (of its text, or of its line in a JSON file) is bad; at most `max_bytes` of it
    are in memory. Raises DataError if the file is gone, unreadable, cut short or damaged.
    """
    source = part.source
    try:
        match source.kind:
            case "text":
                yield _file_text(source, max_bytes)
            case "lines":
                for number, line in _lines(part, max_bytes):
                    yield line if isinstance(line, Bad) else decoded(line, number)
            case "json":
                for number, line in _lines(part, max_bytes):
                    yield line if isinstance(line, Bad) else _json_text(line, number, text_field)
            case "parquet":
                for number, value in rows(source, text_field, part.start, part.stop):
                    yield _row_text(value, number, max_bytes)
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{source.name}: damaged or cut short: {error}") from error


def locate(part: Slice, bad: Bad) -> str:
    """The file and line or row of a bad document, for a message. Counts the lines before the slice by reading them."""
    if part.source.kind == "text":
        return part.source.name
    if part.source.kind == "parquet":
        return f"{part.source.name} row {bad.place}"
    return f"{part.source.name} line {_lines_before(part) + bad.place}"


def decoded(content: bytes, place: int = 0) -> str | Bad:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 (byte {error.start}: {error.reason})", place)


def _too_long(size: str, max_bytes: int, place: int = 0) -> Bad:
    return Bad(f"it has {size} bytes, more than --max-document-bytes {max_bytes}, which can be raised", place)


def _file_text(source: Source, max_bytes: int) -> str | Bad:
    if not source.compression and source.size > max_bytes:
        return _too_long(f"{source.size:,}", max_bytes)
    with unpacked(source) as file:
        content = file.read(max_bytes + 1)
    return decoded(content) if len(content) <= max_bytes else _too_long(f"{len(content):,} or more", max_bytes)


def _row_text(value: Any, number: int, max_bytes: int) -> str | Bad:
    if value is None:
        return Bad("the text is null", number)
    if value.size > max_bytes:
        return _too_long(f"{value.size:,}", max_bytes, number)
    return decoded(value.to_pybytes(), number)


def _json_text(line: bytes, number: int, text_field: str) -> str | Bad:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON ({error})", number)
    if not isinstance(record, dict) or text_field not in record:
        known = f"; it has {', '.join(map(str, record)) or 'none'}" if isinstance(record, dict) else ""
        return Bad(f"no field {text_field!r} (--text-field){known}"[:300], number)
    text = record[text_field]
    if not isinstance(text, str):
        return Bad(f"field {text_field!r} is no string", number)
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return Bad("the text holds a lone surrogate", number)
    return text


def _lines(part: Slice, max_bytes: int) -> Iterator[tuple[int, bytes | Bad]]:
    r"""(number from 1, line) of each line that begins inside the slice, without its line end (`\n` or `\r\n`)."""
    with unpacked(part.source) as file:
        position = _first_line(file, part)
        stop = sys.maxsize if part.source.compression else part.stop  # a slice of a compressed file is the whole file
        for number in itertools.count(1):
            if position >= stop or not (line := file.readline(max_bytes + 2)):
                return
            position += len(line)
            content = _without_end(line)
            if len(content) <= max_bytes:
                yield number, content
            else:
                rest, end = _skip_line(file, line)
                position += rest
                yield number, _too_long(f"{len(line) + rest - end:,}", max_bytes, number)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _first_line(file: BinaryIO, part: Slice) -> int:
    """Seek to the first line that begins inside the slice, or after the slice if none does. Returns the position."""
    if not part.start:
        return 0
    position = file.seek(part.start - 1)
    # If a line begins at `part.start`, the first read gives only the newline of the line above.
    while position < part.stop and (piece := file.readline(CHUNK_BYTES)):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _skip_line(file: BinaryIO, begun: bytes) -> tuple[int, int]:
    """Skip the rest of a line that starts with `begun`. Returns (bytes read, bytes of the line end)."""
    count, last = 0, begun[-2:]
    while not last.endswith(b"\n") and (piece := file.readline(CHUNK_BYTES)):
        count += len(piece)
        last = (last + piece)[-2:]
    return count, len(last) - len(_without_end(last))


def _lines_before(part: Slice) -> int:
    """How many lines of the file begin before the slice."""
    if part.source.compression or not part.start:
        return 0
    count, remaining, last = 0, part.start, b""
    with part.source.path.open("rb") as file:
        while chunk := file.read(min(CHUNK_BYTES, remaining)):
            count += chunk.count(b"\n")
            remaining -= len(chunk)
            last = chunk[-1:]
    return count + (last != b"\n")
