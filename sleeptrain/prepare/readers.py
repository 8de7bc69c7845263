"""The documents of a slice, one after the other, in a memory that does not grow with the file."""

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
    """What should be a document and is not: why, and which line of the slice or row of the file, counted from 1."""

    reason: str
    place: int = 0


def documents(part: Slice, text_field: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> Iterator[str | Bad]:
    """The texts of a slice in order, character for character (line ends inside a document are kept).

    A document that has more than `max_bytes` (of its text; of its whole line where the file is JSON) is bad, and no
    more than that of it is ever held. Raises DataError: the file is gone, unreadable, cut short or damaged as a whole.
    """
    source = part.source
    try:
        match source.kind:
            case "text":
                yield _whole_file(source, max_bytes)
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
    """Where a bad document stands, for the user: reads the file up to there when the slice begins inside it."""
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


def _whole_file(source: Source, max_bytes: int) -> str | Bad:
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
    """The lines that begin inside the slice, from 1, without their ends (a newline, or a carriage return before it)."""
    with unpacked(part.source) as file:
        place = _first_line(file, part)
        stop = sys.maxsize if part.source.compression else part.stop  # of a packed file the slice is all of it
        for number in itertools.count(1):
            if place >= stop or not (line := file.readline(max_bytes + 2)):
                return
            place += len(line)
            content = _without_end(line)
            if len(content) <= max_bytes:
                yield number, content
            else:
                rest, end = _skip_line(file, line)
                place += rest
                yield number, _too_long(f"{len(line) + rest - end:,}", max_bytes, number)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _first_line(file: BinaryIO, part: Slice) -> int:
    """Go to the first line that begins inside the slice, or behind the slice where none does; the place in the file."""
    if not part.start:
        return 0
    place = file.seek(part.start - 1)
    while place < part.stop and (piece := file.readline(CHUNK_BYTES)):  # at once where a newline is before the slice
        place += len(piece)
        if piece.endswith(b"\n"):
            break
    return place


def _skip_line(file: BinaryIO, begun: bytes) -> tuple[int, int]:
    """Read on to the end of a line of which `begun` is read; the bytes read, and how many of the line are its end."""
    count, last = 0, begun[-2:]
    while not last.endswith(b"\n") and (piece := file.readline(CHUNK_BYTES)):
        count += len(piece)
        last = (last + piece)[-2:]
    return count, len(last) - len(_without_end(last))


def _lines_before(part: Slice) -> int:
    """The lines of the file that begin before the slice."""
    if part.source.compression or not part.start:
        return 0
    count, left, last = 0, part.start, b""
    with part.source.path.open("rb") as file:
        while chunk := file.read(min(CHUNK_BYTES, left)):
            count += chunk.count(b"\n")
            left -= len(chunk)
            last = chunk[-1:]
    return count + (last != b"\n")
