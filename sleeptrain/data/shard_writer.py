"""Writes documents into webdataset tar files of a wanted size, with a sidecar each."""

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
# webdataset takes what follows the first dot of a file's name for the sample's field.
KEY = re.compile(r"(?:[^\0]*/)?[^./\0]+")
_PACK_RECORD = struct.Struct("<QII").pack  # as numpy lays out RECORD


class ShardWriter:
    """Appends documents to `folder`/shard-000000.tar and opens the next shard when one holds `shard_bytes`.

    `dtype` is that of the tokens (`token_dtype`). The same documents give the same bytes. Files are written in place:
    use a folder that nobody reads yet.
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
        """Append a document, [D] of the writer's dtype.

        `key` is any webdataset key (no dot behind the last slash). Raises ValueError where it is none or not behind the
        key before in the order of strings, and for tokens of another type or shape or none at all.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no webdataset key")
        if key <= self._last_key:
            raise ValueError(f"key {key!r} does not ascend: the one before is {self._last_key!r}")
        if tokens.ndim != 1 or tokens.dtype != self._dtype or not tokens.size:
            found = f"{tokens.dtype.str}{list(tokens.shape)}"
            raise ValueError(f"document {key!r} is {found}, not {self._dtype.str}[D] with D > 0")
        self._last_key = key
        self._append(key, len(tokens), tokens.tobytes())
        if self._tar.tarstream.offset >= self._shard_bytes:
            self._close_shard()

    def close(self) -> list[Shard]:
        """Finish the last shard; all shards in order, none where no document was added."""
        if self._records:
            self._close_shard()
        return self._shards

    def _append(self, key: str, length: int, content: bytes) -> None:
        if self._file is None:
            self._open_shard()
        size = self._tar.write({"__key__": key, "npy": _npy_header(self._dtype.str, length) + content})
        # Where the next member begins: behind this one's array, which is filled up to whole blocks.
        end = self._tar.tarstream.offset - padding(size, tarfile.BLOCKSIZE)
        self._records += _PACK_RECORD(end - len(content), length, zlib.crc32(content))

    def _open_shard(self) -> None:
        # Here, since webdataset brings torch, which a process that only reads text need not load.
        import webdataset

        self._path = self._folder / f"shard-{len(self._shards):06d}.tar"
        self._file = _Hashed(self._path)
        # An integer time, zero: the bytes depend on the documents only, and no member needs an extended header.
        # No encoder and a tar stream of ours: for a short document theirs take longer than all else together.
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
    """What comes before the elements in the `.npy` file of an array [length]."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    return content.getvalue()


class _Hashed(io.RawIOBase):
    """A file to write that knows its size and sha256."""

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
