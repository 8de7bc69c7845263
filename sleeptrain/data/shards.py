"""Token shards: tokenised documents as webdataset tar files with an index.

A folder holds `shard-000000.tar`, `shard-000001.tar`, ... with a sidecar each and `index.json`. A tar member is one
document: a `.npy` array of [BOS] + tokens + [EOS], uint16 (uint32 for 65,536 ids and more), named by its key.
webdataset and wids read the shards as they are. The sidecar says where each document lies and its crc32; the index adds
what makes a mix-up or damage visible: sha256 and token count of each shard, the tokenizer's sha256, and the totals.
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
from sleeptrain.data.storage import DEFAULT_CACHE, DEFAULT_RETRIES, Cache, LocalFolder, Retries, Storage, locate
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import staged_folder
from sleeptrain.terminal import hide_credentials

FAILED_FOR = 60.0  # seconds in which a shard that could not be read is not tried again for its next document
RECORD_FIELDS = struct.Struct("<QII")  # of one RECORD, quicker than through numpy

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
    """Tokenise `texts`, one document each, into shards of about `shard_bytes`; `folder` appears when all is written.

    A document is [BOS] tokens [EOS], without BOS where the tokenizer has none; its key is its zero-padded number. The
    same texts and tokenizer give the same bytes. Raises DataError: `folder` exists and is not empty, or no text.
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
    """A document cannot be read, or is not what it was when it was written. shard, index: which one."""

    def __init__(self, message: str, shard: int, index: int) -> None:
        super().__init__(message)
        self.shard = shard
        self.index = index


class TokenShards:
    """Random access to the documents of token shards, wherever they are; any thread may ask for anything.

    location: see `storage.locate`. With a pattern only the shards it names are read.
    shards: what index.json says of each shard that is read; num_shards, num_documents, num_tokens (BOS and EOS
    counted): of these. num_bytes: of their text, 0 where nobody counted them; with a pattern, a share in proportion to
    the tokens. shard_tokens_S, shard_documents_S: int64 [num_shards]. vocab_size, tokenizer_hash: of the tokenizer that
    made the shards.
    fingerprint: sha256 of what identifies the content, the same wherever it is.

    Opening reads index.json, and the size and time of local files. Sidecars and descriptors are kept for at most
    `open_shards` shards, those used last, so that memory does not grow with the data.
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
        # Not a method: a circle of references would keep descriptors open until the collector comes by.
        self._prefetcher = Prefetcher(partial(_fetch, self._storage, self.shards))

    def lengths(self, shard: int) -> np.ndarray:
        """Tokens of each document of a shard, int64 [D]; reads its sidecar. Raises DataError: missing or damaged."""
        records_D = np.frombuffer(self._opened(shard).records, RECORD)
        return records_D["length"].astype(np.int64)

    def document(self, shard: int, index: int) -> np.ndarray:
        """All tokens of a document, as they are stored: [D], read-only.

        Raises DamagedDocument when they cannot be read, or are, also at a second look, not those that were written.
        IndexError: no such document.
        """
        try:
            tokens = self._read(shard, index)
            if tokens is not None:
                return tokens
            self._storage.discard(self.shards[shard].url, self.shards[shard].sha256)
        except OSError:
            pass  # of a disk or a network: looked at again, with waits
        except DataError as error:
            raise self._unreadable(shard, index, error) from error
        return self._read_anew(shard, index)

    def prefetch(self, shard: int) -> None:
        """Ask for a shard that will be read soon; returns at once."""
        self._prefetcher.ask(shard)

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Each shard's place and what is wrong with it, None if nothing: reads all of it, and all of its sidecar."""
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
        """The document's tokens, None where their checksum is wrong. Raises OSError, and DataError: no use to retry."""
        opened = self._open.get(shard) or self._opened(shard)
        if not 0 <= index < len(opened.records) // RECORD_FIELDS.size:
            raise IndexError(f"document {index} of shard {shard}")
        offset, length, crc32 = RECORD_FIELDS.unpack_from(opened.records, index * RECORD_FIELDS.size)
        size = length * self._dtype.itemsize
        descriptor = opened.descriptor
        if descriptor is None:
            descriptor = self._open_tar(shard, opened)
        # Read rather than mapped: a disk that fails is then an error to be answered, not a signal that kills.
        content = os.pread(descriptor, size, offset)
        if len(content) != size or zlib.crc32(content) != crc32:
            return None
        return np.frombuffer(content, self._dtype)

    def _read_anew(self, shard: int, index: int) -> np.ndarray:
        """What `_read` gives with another descriptor, after waits if need be. Raises DamagedDocument."""

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
        """The error to raise; a shard that fails as a whole is not tried for other documents for a while."""
        if isinstance(error, DataError):
            self._failed.setdefault(shard, (time.monotonic() + FAILED_FOR, str(error)))
        where = self._storage.where(self.shards[shard].url)
        opened = self._open.get(shard)
        at = ""
        if opened is not None:
            at = f", at byte {RECORD_FIELDS.unpack_from(opened.records, index * RECORD_FIELDS.size)[0]},"
        return DamagedDocument(
            f"{where}: document {index}{at} cannot be read ({error}); restore the file", shard, index
        )

    def _opened(self, shard: int) -> OpenShard:
        """The shard's records, held or read. Raises DataError, and IndexError: no such shard."""
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
        """The records of a shard's documents; a damaged copy is looked at twice. Raises DataError."""
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
    wanted = set(names)
    return tuple(shard for shard in shards if shard.url in wanted)


def _fingerprint(index: ShardIndex, shards: Sequence[Shard]) -> str:
    content = [[shard.url, shard.sha256, shard.nsamples, shard.tokens] for shard in shards]
    return hashlib.sha256(json.dumps([index.dtype.str, index.tokenizer_hash, content]).encode()).hexdigest()
