"""The documents of a slice, one after the other, in a memory that does not grow with the file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import Source
from sleeptrain.prepare.parquet import rows
from sleeptrain.prepare.units import Slice

CHUNK_BYTES = 2**20
PACKED_BYTES = 2**17
ZSTD_WINDOW = 2**31  # the largest that the command `zstd --long` makes


@dataclass(frozen=True)
class Bad:
    """What should be a document and is not: why, and which line of the slice or row of the file, counted from 1."""

    reason: str
    place: int = 0


def documents(part: Slice, text_field: str) -> Iterator[str | Bad]:
    """The texts of a slice in order, character for character (line ends inside a document are kept).

    Raises DataError: the file is gone, unreadable, cut short or damaged as a whole.
    """
    source = part.source
    try:
        match source.kind:
            case "text":
                yield decoded(b"".join(_chunks(source)))
            case "lines":
                for number, line in enumerate(_lines(part), 1):
                    yield decoded(line.removesuffix(b"\r"), number)
            case "json":
                for number, line in enumerate(_lines(part), 1):
                    yield _json_text(line, number, text_field)
            case "parquet":
                for number, value in rows(source, text_field, part.start, part.stop):
                    yield decoded(value, number) if value is not None else Bad("the text is null", number)
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
        text.encode()
    except UnicodeEncodeError:
        return Bad("the text holds a lone surrogate", number)
    return text


def _lines(part: Slice) -> Iterator[bytes]:
    """The lines that begin inside the slice, without the newline; only a newline ends a line."""
    if part.source.compression:
        yield from _split_lines(_chunks(part.source))
        return
    with part.source.path.open("rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # ends at once where the byte before the slice is a newline
        while file.tell() < part.stop and (line := file.readline()):
            yield line.removesuffix(b"\n")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
    if any(begun):
        yield b"".join(begun)


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


def _chunks(source: Source) -> Iterator[bytes]:
    """The content of a file, unpacked, in pieces."""
    if source.compression == "zstd":
        yield from _zstd_chunks(source)
        return
    with gzip.open(source.path) if source.compression else source.path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(source: Source) -> Iterator[bytes]:
    """Frame by frame: the library's own reader takes a frame that is cut short for a whole one."""
    zstandard = _zstandard(source)
    new_frame: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
    frame, begun = new_frame(), False
    with source.path.open("rb") as file:
        while packed := file.read(PACKED_BYTES):
            while packed:
                try:
                    yield frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise DataError(f"{source.name}: damaged: {error}") from error
                packed, begun = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = new_frame()
    if begun:
        raise DataError(f"{source.name}: cut short inside a zstd frame")


def _zstandard(source: Source) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{source.name}: zstandard is not installed: pip install 'sleeptrain[data]'") from error
    return zstandard
