"""Token shards: tokenised documents as webdataset tar files with an index.

A folder holds `shard-000000.tar`, `shard-000001.tar`, ..., each with a sidecar, and `index.json`. A tar member is one
document: a `.npy` array of [BOS] + tokens + [EOS], uint16 (uint32 for 65,536 ids and more), named by its key.
webdataset and wids can read the shards. The sidecar holds the byte position and crc32 of each document. The index holds
the sha256 and token count of each shard, the tokenizer's sha256 and the totals, which reveal damage and mix-ups.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sleeptrain.data.prefetch import Prefetcher
from sleeptrain.data.shard_check import check_files, compare
from sleeptrain.data.shard_index import (
    INDEX_NAME,
    RECORD,
    Shard,
    ShardIndex,
    index_name,
    parse_index,
    parse_sidecar,
    token_dtype,
    write_index,
)
from sleeptrain.data.shard_open import OPEN_SHARDS, OpenShard, OpenShards
from sleeptrain.data.shard_writer import SHARD_BYTES, ShardWriter
from sleeptrain.data.storage import DEFAULT_CACHE, DEFAULT_RETRIES, Cache, LocalFolder, Storage, locate
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import staged_folder
from sleeptrain.remote import Retries
from sleeptrain.terminal import hide_credentials

FAILED_FOR = 60.0  # seconds during which a shard that could not be read is not tried again for other documents
RECORD_FIELDS = struct.Struct("<QII")  # the fields of one RECORD; faster than numpy

__all__ = [
    "INDEX_NAME",
    "SHARD_BYTES",
    "DamagedDocument",
    "Shard",
    "ShardWriter",
    "TokenShards",
    "index_name",
    "token_dtype",
    "write_index",
    "write_shards",
]


def write_shards(
    folder: Path, texts: Iterable[str], tokenizer: Tokenizer, name: str, shard_bytes: int = SHARD_BYTES
) -> TokenShards:
    """Tokenise `texts`, one document each, into shards of about `shard_bytes` bytes. `folder` appears at the end.

    A document is [BOS] tokens [EOS], without BOS if the tokenizer has none; its key is its zero-padded number. The same
    texts and tokenizer give the same bytes. Raises DataError: `folder` exists and is not empty, or no text.
    """
    folder = Path(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    num_bytes = 0
    with staged_folder(folder) as staged:
        writer = ShardWriter(staged, dtype, shard_bytes)
        for number, text in enumerate(texts):
            writer.add(f"{number:09d}", np.array([*first, *tokenizer.encode(text), tokenizer.eos_id], dtype))
            num_bytes += len(text.encode())
        shards = writer.close()
        if not shards:
            raise DataError(f"{folder}: no document to write")
        write_index(
            staged,
            shards,
            name=name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            num_bytes=num_bytes,
        )
    return TokenShards(folder)


class DamagedDocument(DataError):
    """A document cannot be read, or its content has changed. shard, index: number of the document."""

    def __init__(self, message: str, shard: int, index: int) -> None:
        super().__init__(message)
        self.shard = shard
        self.index = index


class TokenShards:
    """Random access to the documents of local or remote token shards. Thread-safe.

    location: see `storage.locate`. A pattern selects some of the shards.
    shards: the selected shards, as index.json lists them.
    num_shards, num_documents, num_tokens: totals of the selected shards; tokens with BOS and EOS.
    num_bytes: bytes of the text, 0 if unknown; with a pattern, a share in proportion to the tokens.
    shard_tokens_S, shard_documents_S: tokens and documents of each shard, int64 [num_shards].
    vocab_size, tokenizer_hash: of the tokenizer that made the shards.
    fingerprint: sha256 that identifies the content and does not depend on the location.

    Opening reads index.json, and the size and time of local files. Sidecars and descriptors are kept for the
    `open_shards` most recently used shards, so that memory does not grow with the data.
    Raises DataError, naming the file: folder, index or shard missing, damaged, or made with another tokenizer than
    `expect_tokenizer`. ConfigError: a pattern that cannot be read.
    """

    def __init__(
        self,
        location: str | Path,
        expect_tokenizer: str | None = None,
        cache: Cache = DEFAULT_CACHE,
        retries: Retries = DEFAULT_RETRIES,
        open_shards: int = OPEN_SHARDS,
    ) -> None:
        self.location = hide_credentials(str(location))
        self._retries = retries
        self._storage, names = locate(location, cache, retries)
        index = self._read_index()
        if expect_tokenizer is not None and expect_tokenizer != index.tokenizer_hash:
            raise DataError(
                f"{self.location} was made with the tokenizer of sha256 {index.tokenizer_hash}, but the tokenizer "
                f"given has {expect_tokenizer}; set data.shards.tokenizer to the one the shards were made with"
            )
        self.shards = index.shards if names is None else _select(index.shards, names, self.location)
        if isinstance(self._storage, LocalFolder):
            check_files(self._storage.folder, self.shards)
        self._dtype = index.dtype
        self.vocab_size = index.vocab_size
        self.tokenizer_hash = index.tokenizer_hash
        self.num_shards = len(self.shards)
        self.shard_tokens_S = np.array([shard.tokens for shard in self.shards], np.int64)
        self.shard_documents_S = np.array([shard.nsamples for shard in self.shards], np.int64)
        self.num_documents = int(self.shard_documents_S.sum())
        self.num_tokens = int(self.shard_tokens_S.sum())
        self.num_bytes = index.bytes * self.num_tokens // index.tokens
        self.fingerprint = _fingerprint(index, self.shards)
        self._open = OpenShards(open_shards)
        self._failed: dict[int, tuple[float, str]] = {}
        # Not a method: a reference cycle would keep descriptors open until the garbage collector runs.
        self._prefetcher = Prefetcher(partial(_fetch, self._storage, self.shards))

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, int64 [D]; reads its sidecar. Raises DataError: missing or damaged."""
        records_D = np.frombuffer(self._opened(shard).records, RECORD)
        return records_D["length"].astype(np.int64)

    def document(self, shard: int, index: int) -> np.ndarray:
        """All tokens of a document in their stored dtype: [D], read-only.

        Raises DamagedDocument if they cannot be read, or if their checksum is wrong also after a second read.
        IndexError: no such document.
        """
        try:
            tokens = self._read(shard, index)
            if tokens is not None:
                return tokens
            self._storage.discard(self.shards[shard].url, self.shards[shard].sha256)
        except OSError:
            pass  # an error of a disk or a network: read again below, with waits
        except DataError as error:
            raise self._unreadable(shard, index, error) from error
        return self._read_anew(shard, index)

    def prefetch(self, shard: int) -> None:
        """Request a shard that will be read soon; returns at once."""
        self._prefetcher.ask(shard)

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """(location, error or None) of each shard. Reads the whole shard and its sidecar."""
        for shard in self.shards:
            where = self._storage.where(shard.url)
            try:
                records_D = np.frombuffer(self._read_sidecar(shard), RECORD)
                with open(self._storage.open(shard.url, shard.sha256), "rb") as file:
                    problem = compare(file, shard, records_D, self._dtype)
                yield where, problem and f"{where}: {problem}"
            except (OSError, DataError) as error:
                yield where, str(error)

    def _read_index(self) -> ShardIndex:
        where = self._storage.where(INDEX_NAME)
        try:
            content = self._storage.read(INDEX_NAME)
        except OSError as error:
            raise DataError(f"{where}: {error.strerror}; is this a folder made with tools/prepare.py?") from error
        return parse_index(content, where)

    def _read(self, shard: int, index: int) -> np.ndarray | None:
        """The document's tokens; None: wrong checksum. Raises OSError, or DataError if a retry is useless."""
        opened = self._open.get(shard) or self._opened(shard)
        if not 0 <= index < len(opened.records) // RECORD_FIELDS.size:
            raise IndexError(f"document {index} of shard {shard}")
        offset, length, crc32 = RECORD_FIELDS.unpack_from(opened.records, index * RECORD_FIELDS.size)
        size = length * self._dtype.itemsize
        descriptor = opened.descriptor
        if descriptor is None:
            descriptor = self._open_tar(shard, opened)
        # Not memory-mapped: a failing disk then raises an error and sends no signal that kills the process.
        content = os.pread(descriptor, size, offset)
        if len(content) != size or zlib.crc32(content) != crc32:
            return None
        return np.frombuffer(content, self._dtype)

    def _read_anew(self, shard: int, index: int) -> np.ndarray:
        """Read a document again with a new descriptor, with retries. Raises DamagedDocument."""

        def read() -> np.ndarray | None:
            self._open.forget(shard)
            return self._read(shard, index)

        where = self._storage.where(self.shards[shard].url)
        try:
            tokens = self._retries.run(read, where, OSError)
        except (OSError, DataError) as error:
            raise self._unreadable(shard, index, error) from error
        if tokens is None:
            offset, length, _ = RECORD_FIELDS.unpack_from(self._opened(shard).records, index * RECORD_FIELDS.size)
            raise DamagedDocument(
                f"{where}: document {index} of {length} tokens, at byte {offset}, is damaged: its crc32 is wrong; "
                "restore the file",
                shard,
                index,
            )
        return tokens

    def _unreadable(self, shard: int, index: int, error: Exception) -> DamagedDocument:
        """The error to raise. If the whole shard fails, remember that, so that other documents of it fail at once."""
        if isinstance(error, DataError):
            self._failed.setdefault(shard, (time.monotonic() + FAILED_FOR, str(error)))
        where = self._storage.where(self.shards[shard].url)
        opened = self._open.get(shard)
        offset = ""
        if opened is not None:
            offset = f", at byte {RECORD_FIELDS.unpack_from(opened.records, index * RECORD_FIELDS.size)[0]},"
        return DamagedDocument(
            f"{where}: document {index}{offset} cannot be read ({error}); restore the file", shard, index
        )

    def _opened(self, shard: int) -> OpenShard:
        """The open shard, from the cache or read now. Raises DataError, and IndexError: no such shard."""
        opened = self._open.get(shard)
        if opened is None:
            if not 0 <= shard < self.num_shards:
                raise IndexError(f"shard {shard} of {self.num_shards}")
            self._check_failed(shard)
            opened = self._open.put(shard, OpenShard(self._read_sidecar(self.shards[shard])))
        return opened

    def _open_tar(self, shard: int, opened: OpenShard) -> int:
        self._check_failed(shard)
        descriptor = self._storage.open(self.shards[shard].url, self.shards[shard].sha256)
        return self._open.set_descriptor(opened, descriptor)

    def _check_failed(self, shard: int) -> None:
        until, message = self._failed.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise DataError(message)
        self._failed.pop(shard, None)

    def _read_sidecar(self, shard: Shard) -> bytes:
        """The records of a shard's documents; a damaged copy is fetched again once. Raises DataError."""
        name, sha256 = index_name(shard.url), shard.index_sha256

        def read() -> bytes:
            with open(self._storage.open(name, sha256), "rb") as file:
                return file.read()

        where = self._storage.where(name)
        try:
            try:
                return parse_sidecar(self._retries.run(read, where, OSError), shard)
            except ValueError:
                self._storage.discard(name, sha256)
                return parse_sidecar(self._retries.run(read, where, OSError), shard)
        except (OSError, ValueError, DataError) as error:
            reason = str(error).removeprefix(f"{where}: ")
            raise DataError(
                f"{where}: {reason}; restore the file, or index the folder anew: tools/shards.py index FOLDER "
                "--tokenizer PATH"
            ) from error


def _fetch(storage: Storage, shards: Sequence[Shard], number: int) -> None:
    shard = shards[number]
    storage.prefetch(index_name(shard.url), shard.index_sha256)
    storage.prefetch(shard.url, shard.sha256)


def _select(shards: Sequence[Shard], names: Sequence[str], location: str) -> tuple[Shard, ...]:
    missing = sorted(set(names) - {shard.url for shard in shards})
    if missing:
        raise DataError(f"{location}: {missing[0]} is not in {INDEX_NAME}, which has {len(shards)} shards")
    selected = set(names)
    return tuple(shard for shard in shards if shard.url in selected)


def _fingerprint(index: ShardIndex, shards: Sequence[Shard]) -> str:
    content = [[shard.url, shard.sha256, shard.nsamples, shard.tokens] for shard in shards]
    return hashlib.sha256(json.dumps([index.dtype.str, index.tokenizer_hash, content]).encode()).hexdigest()
