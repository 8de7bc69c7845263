"""Where the arrays of a tar file of `.npy` members lie, read from the headers alone."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from sleeptrain.errors import DataError

BLOCK = 512
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_PREFIX = len(NPY_MAGIC) + 2  # the magic, then the header's length as uint16


def index_arrays(buffer: mmap.mmap, dtype: np.dtype[Any], path: Path, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Byte offset and number of elements of each member's array, both int64 [D], in file order.

    `buffer` is a USTAR file whose members are one-dimensional `.npy` arrays of `dtype`. Raises DataError, naming `path`
    and `remedy`, where it is anything else or ends early.
    """
    offsets: list[int] = []
    lengths: list[int] = []
    position = 0
    while True:
        header = buffer[position : position + BLOCK]
        if len(header) < BLOCK:
            raise DataError(f"{path}: the tar file ends early; {remedy}")
        if not header.strip(b"\0"):  # a block of zeros ends the archive
            return np.array(offsets, np.int64), np.array(lengths, np.int64)
        try:
            size = _member_size(header)
            offset, length = _array_span(buffer, position + BLOCK, size, dtype)
        except ValueError as error:
            raise DataError(f"{path}: damaged at byte {position} ({error}); {remedy}") from error
        offsets.append(offset)
        lengths.append(length)
        position += BLOCK + -(-size // BLOCK) * BLOCK


def _member_size(header: bytes) -> int:
    if header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
        raise ValueError("no USTAR header of a file")
    return int(header[124:136].rstrip(b"\0 "), 8)


def _array_span(buffer: mmap.mmap, start: int, size: int, dtype: np.dtype[Any]) -> tuple[int, int]:
    prefix = buffer[start : start + NPY_PREFIX]
    if start + size > len(buffer) or prefix[: len(NPY_MAGIC)] != NPY_MAGIC:
        raise ValueError("no .npy array")
    offset = start + NPY_PREFIX + int.from_bytes(prefix[-2:], "little")
    header = buffer[start + NPY_PREFIX : offset]
    length, rest = divmod(start + size - offset, dtype.itemsize)
    if f"'descr': '{dtype.str}'".encode() not in header or f"'shape': ({length},)".encode() not in header or rest:
        raise ValueError(f"no one-dimensional array of {dtype.str}")
    return offset, length
