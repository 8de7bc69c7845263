"""The arrays in a tar file of `.npy` members, read once from its beginning to its end."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

BLOCK = 512
CHUNK = 2**20
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_PREFIX = len(NPY_MAGIC) + 2  # the magic, then the header's length as uint16
FILE, EXTENDED, EXTENDED_FOR_ALL, LONG_NAME = (b"0", b"\0"), b"x", b"g", b"L"
CHECKSUM = slice(148, 156)


def padding(size: int, block: int = BLOCK) -> int:
    """The number of bytes from `size` to the next multiple of `block`."""
    return -size % block


@dataclass(frozen=True, slots=True)
class Member:
    """One `.npy` member. key: its name without the suffix. offset: byte in the tar file at which the elements begin.
    array: one-dimensional."""

    key: str
    offset: int
    array: np.ndarray


class TarArrays:
    """The members of a tar file of one-dimensional `.npy` arrays, in file order.

    `file` is read in sequence, with one member in memory at a time. Iterating raises ValueError, which names the byte,
    if the file has other content, is damaged, or ends early. At the end, `size` and `sha256` are those of the whole
    file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        name = ""
        while True:
            start = self.size
            header = self._take(BLOCK)
            if not header.strip(b"\0"):  # a block of zeros ends the archive
                break
            try:
                kind, size = _parse_header(header)
                content_start = self.size
                content = self._take(size + padding(size))[:size]
                if kind in (EXTENDED, LONG_NAME):
                    name = _long_name(kind, content) or name
                elif kind != EXTENDED_FOR_ALL:
                    key, name = _key(name or _short_name(header)), ""
                    offset, array = _parse_npy(content)
                    yield Member(key, content_start + offset, array)
            except ValueError as error:
                raise ValueError(f"damaged or no array at byte {start}: {error}") from error
        while self._read(CHUNK):
            pass

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._digest.update(content)
        self.size += len(content)
        return content

    def _take(self, size: int) -> bytes:
        content = self._read(size)
        if len(content) < size:
            raise ValueError(f"the tar file ends early, at byte {self.size}")
        return content


def _parse_header(header: bytes) -> tuple[bytes, int]:
    """(kind, size in bytes) of a member."""
    if header[257:262] != b"ustar":
        raise ValueError("no USTAR header")
    if sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ") != int(header[CHECKSUM].strip(b"\0 "), 8):
        raise ValueError("the header does not match its checksum")
    kind = header[156:157]
    if kind not in (*FILE, EXTENDED, EXTENDED_FOR_ALL, LONG_NAME):
        raise ValueError(f"{_short_name(header)!r} is no file")
    return kind, int(header[124:136].strip(b"\0 "), 8)


def _short_name(header: bytes) -> str:
    name, prefix = (field.split(b"\0")[0].decode() for field in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _long_name(kind: bytes, content: bytes) -> str:
    """The name in an extended header; empty if it holds no name."""
    if kind == LONG_NAME:
        return content.rstrip(b"\0").decode()
    match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
    return match[1].decode() if match else ""


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    if suffix != "npy" or not key:
        raise ValueError(f"{name!r} is no .npy file")
    return folder + slash + key


def _parse_npy(content: bytes) -> tuple[int, np.ndarray]:
    """(byte in a `.npy` file at which the elements begin, the array)."""
    if content[: len(NPY_MAGIC)] != NPY_MAGIC:
        raise ValueError("no .npy array of version 1.0")
    offset = NPY_PREFIX + int.from_bytes(content[NPY_PREFIX - 2 : NPY_PREFIX], "little")
    dtype, shape = _array_type(content[NPY_PREFIX - 2 : offset])
    if len(shape) != 1 or dtype.hasobject or shape[0] * dtype.itemsize != len(content) - offset:
        raise ValueError(f"an array of {dtype.str}{list(shape)} is not one-dimensional, or cut")
    return offset, np.frombuffer(content, dtype, shape[0], offset)


@lru_cache(2**16)  # documents of equal length have equal headers
def _array_type(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return dtype, shape
