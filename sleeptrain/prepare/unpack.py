"""The content of files that may be compressed. Only a few pieces of it are in memory at a time."""

from __future__ import annotations

import gzip
import io
from typing import Any, BinaryIO, cast

from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import Source

CHUNK_BYTES = 2**20
# Bytes per call of zstd. Few, since four bytes may unpack to 128 KiB: a call yields at most 8 MiB.
PACKED_BYTES = 2**8
ZSTD_WINDOW = 2**31  # the largest window of the command `zstd --long`


def unpacked(source: Source) -> BinaryIO:
    """The content of a file, read in pieces of CHUNK_BYTES. Raises DataError if a package is not installed."""
    if source.compression == "zstd":
        return io.BufferedReader(_ZstdFrames(source), CHUNK_BYTES)
    if source.compression:
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(source.path)), CHUNK_BYTES)
    return source.path.open("rb", CHUNK_BYTES)


class _ZstdFrames(io.RawIOBase):
    """The content of a zstd file, frame by frame.

    The library's own reader does not notice that a frame is cut short. Reading raises DataError if the file is damaged
    or cut short.
    """

    def __init__(self, source: Source) -> None:
        self._name = source.name
        self._library = _zstandard(source)
        self._file = source.path.open("rb")
        self._packed = b""
        self._content = memoryview(b"")  # unpacked, not yet read
        self._new_frame()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._content and self._unpack():
            pass
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _new_frame(self) -> None:
        self._frame = self._library.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        self._begun = False

    def _unpack(self) -> bool:
        """Unpack the next piece, which may be empty. Returns False at the end of the file."""
        self._packed = self._packed or self._file.read(PACKED_BYTES)
        if not self._packed:
            if self._begun:
                raise DataError(f"{self._name}: cut short inside a zstd frame")
            return False
        try:
            self._content = memoryview(self._frame.decompress(self._packed))
        except self._library.ZstdError as error:
            raise DataError(f"{self._name}: damaged: {error}") from error
        self._packed, self._begun = self._frame.unused_data, True
        if self._frame.eof:
            self._new_frame()
        return True


def _zstandard(source: Source) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{source.name}: zstandard is not installed: pip install 'sleeptrain[data]'") from error
    return zstandard
