"""Writes documents into webdataset tar files of a given size, each with a sidecar."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sleeptrain.data.shard_index import RECORD, Shard, index_name, sidecar_bytes
from sleeptrain.data.tar_index import padding
from sleeptrain.data.tar_stream import TarStream

SHARD_BYTES = 64 * 2**20
WRITE_BYTES = 2**20
# In webdataset the field of a sample is the part of the file name after its first dot.
KEY = re.compile(r"(?:[^\0]*/)?[^./\0]+")
_PACK_RECORD = struct.Struct("<QII").pack  # the memory layout of RECORD


class ShardWriter:
    """Appends documents to `folder`/shard-000000.tar and opens the next shard when one has `shard_bytes` bytes.

    dtype: type of the tokens (`token_dtype`). The same documents give the same bytes. Files are written in place, so
    use a folder that no process reads yet.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = Path(folder)
        self._dtype = np.dtype(dtype)
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._last_key = ""
        self._file: _Hashed | None = None
        self._records = bytearray()  # of RECORD

    def add(self, key: str, tokens: np.ndarray) -> None:
        """Append a document: `tokens` [D] of the writer's dtype.

        key: any webdataset key (no dot after the last slash). Raises ValueError if it is no key or not greater than the
        last key in string order, and for no tokens or tokens of another type or shape.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no webdataset key")
        if key <= self._last_key:
            raise ValueError(f"key {key!r} does not ascend: the one before is {self._last_key!r}")
        if tokens.ndim != 1 or tokens.dtype != self._dtype or not tokens.size:
            actual = f"{tokens.dtype.str}{list(tokens.shape)}"
            raise ValueError(f"document {key!r} is {actual}, not {self._dtype.str}[D] with D > 0")
        self._last_key = key
        self._append(key, len(tokens), tokens.tobytes())
        if self._tar.tarstream.offset >= self._shard_bytes:
            self._close_shard()

    def close(self) -> list[Shard]:
        """Finish the last shard. Returns all shards in order; empty if no document was added."""
        if self._records:
            self._close_shard()
        return self._shards

    def _append(self, key: str, length: int, content: bytes) -> None:
        if self._file is None:
            self._open_shard()
        size = self._tar.write({"__key__": key, "npy": _npy_header(self._dtype.str, length) + content})
        # The stream ends with the padding of this member to whole blocks.
        end = self._tar.tarstream.offset - padding(size, tarfile.BLOCKSIZE)
        self._records += _PACK_RECORD(end - len(content), length, zlib.crc32(content))

    def _open_shard(self) -> None:
        # Imported here, because webdataset imports torch, which a process that only reads text does not need.
        import webdataset

        self._path = self._folder / f"shard-{len(self._shards):06d}.tar"
        self._file = _Hashed(self._path)
        # Time zero, as an integer: the bytes depend on the documents only, and no member needs an extended header.
        # Without webdataset's encoder and tar stream, which for short documents take more than half of the time.
        self._tar = webdataset.TarWriter(self._file, mtime=0, encoder=False)
        self._buffer = io.BufferedWriter(self._file, WRITE_BYTES)
        self._tar.tarstream = TarStream(fileobj=self._buffer, mode="w")

    def _close_shard(self) -> None:
        assert self._file is not None
        self._tar.close()
        file, self._file = self._file, None
        self._buffer.close()
        records_D = np.frombuffer(bytes(self._records), RECORD)
        self._records.clear()
        sidecar = sidecar_bytes(records_D)
        self._path.with_name(index_name(self._path.name)).write_bytes(sidecar)
        self._shards.append(
            Shard(
                url=self._path.name,
                nsamples=len(records_D),
                filesize=file.size,
                sha256=file.sha256.hexdigest(),
                tokens=int(records_D["length"].sum(dtype=np.int64)),
                index_sha256=hashlib.sha256(sidecar).hexdigest(),
            )
        )


@lru_cache(2**14)  # documents of equal length have equal headers
def _npy_header(dtype: str, length: int) -> bytes:
    """The header of the `.npy` file of an array [length]."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    return content.getvalue()


class _Hashed(io.RawIOBase):
    """A file opened for writing that counts its bytes and computes their sha256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", 0)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        written = self._file.write(content)
        self.sha256.update(memoryview(content)[:written])
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        self._file.close()
        super().close()
