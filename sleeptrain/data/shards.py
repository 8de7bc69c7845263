"""Token shards: tokenised documents as webdataset tar files with an index.

A folder holds `shard-000000.tar`, `shard-000001.tar`, ... and `index.json`. A tar member is one document: a `.npy`
array of [BOS] + tokens + [EOS], uint16 (uint32 for 65,536 ids and more), named by its zero-padded number. The index has
the form of wids, so that webdataset and wids read the shards as they are, and adds what makes a mix-up or damage
visible: sha256 and token count of each shard, the tokenizer's sha256, and the totals.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from sleeptrain.data.tar_index import index_arrays
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import staged_folder

INDEX_NAME = "index.json"
INDEX_KIND = "wids-shard-index-v1"
SHARD_BYTES = 64 * 2**20
REMEDY = "remove the folder and make it again with tools/prepare.py"


@dataclass(frozen=True)
class Shard:
    """One tar file: its name beside the index, documents, bytes, checksum, and tokens (BOS and EOS counted)."""

    url: str
    nsamples: int
    filesize: int
    sha256: str
    tokens: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The little-endian integer type of tokens in a shard."""
    return np.dtype("<u2") if vocab_size < 2**16 else np.dtype("<u4")


def write_shards(
    folder: Path, texts: Iterable[str], tokenizer: Tokenizer, name: str, shard_bytes: int = SHARD_BYTES
) -> TokenShards:
    """Tokenise `texts`, one document each, into shards of about `shard_bytes`; `folder` appears when all is written.

    The same texts and tokenizer give the same bytes. Raises DataError: `folder` exists and is not empty, or no text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    num_bytes = 0
    with staged_folder(folder) as staged:
        writer = _ShardWriter(staged, shard_bytes)
        for text in texts:
            ids = tokenizer.encode(text)
            writer.add(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype))
            num_bytes += len(text.encode())
        writer.close_shard()
        if not writer.shards:
            raise DataError(f"{folder}: no document to write")
        index = {
            "__kind__": INDEX_KIND,
            "wids_version": 1,
            "name": name,
            "shardlist": [asdict(shard) for shard in writer.shards],
            "dtype": dtype.str,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.hash,
            "documents": writer.num_documents,
            "tokens": sum(shard.tokens for shard in writer.shards),
            "bytes": num_bytes,
        }
        (staged / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return TokenShards(folder)


class _ShardWriter:
    """Appends documents to a shard and opens the next one when it is full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.shards: list[Shard] = []
        self.num_documents = 0
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._tar: webdataset.TarWriter | None = None
        self._tokens = self._samples = 0

    def add(self, tokens: np.ndarray) -> None:
        if self._tar is None:
            self._file = (self._folder / f"shard-{len(self.shards):06d}.tar").open("wb")
            # An integer time of zero: the bytes depend on the documents only, and no member needs an extended header.
            self._tar = webdataset.TarWriter(self._file, mtime=0)
        self._tar.write({"__key__": f"{self.num_documents:09d}", "npy": tokens})
        self.num_documents += 1
        self._samples += 1
        self._tokens += len(tokens)
        if self._file.tell() >= self._shard_bytes:
            self.close_shard()

    def close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._file.close()
        path = Path(self._file.name)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append(Shard(path.name, self._samples, path.stat().st_size, sha256, self._tokens))
        self._tar = None
        self._tokens = self._samples = 0


class TokenShards:
    """Random access to the documents of a folder of shards, without copying them.

    num_documents, num_tokens (BOS and EOS counted), num_bytes (of text). lengths_D: int64, tokens of each document.
    tokenizer_hash, vocab_size: of the tokenizer that made the shards.
    `verify` compares each shard's sha256, which reads all of it; sizes and counts are compared always.
    Raises DataError, naming the file: folder, index or shard missing, damaged, or made with another tokenizer than
    `expect_tokenizer`.
    """

    def __init__(self, folder: Path, verify: bool = True, expect_tokenizer: str | None = None) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.num_documents: int = index["documents"]
        self.num_tokens: int = index["tokens"]
        self.num_bytes: int = index["bytes"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer_sha256"]
        if expect_tokenizer is not None and expect_tokenizer != self.tokenizer_hash:
            raise DataError(
                f"{self.folder} was made with the tokenizer of sha256 {self.tokenizer_hash}, but the tokenizer given "
                f"has {expect_tokenizer}; set data.shards.tokenizer to the one the shards were made with"
            )
        self._dtype = np.dtype(index["dtype"])
        self._buffers: list[mmap.mmap] = []
        offsets, lengths = [], []
        for shard in index["shardlist"]:
            path = self.folder / shard.url
            buffer = _open_shard(path, shard, verify)
            offsets_D, lengths_D = index_arrays(buffer, self._dtype, path, REMEDY)
            if len(lengths_D) != shard.nsamples or lengths_D.sum() != shard.tokens:
                raise DataError(f"{path}: holds other documents than {INDEX_NAME} says; {REMEDY}")
            self._buffers.append(buffer)
            offsets.append(offsets_D)
            lengths.append(lengths_D)
        self._offsets_D = np.concatenate(offsets)
        self.lengths_D = np.concatenate(lengths)
        self._shard_ends = np.cumsum([len(lengths_D) for lengths_D in lengths])
        if (len(self.lengths_D), self.lengths_D.sum()) != (self.num_documents, self.num_tokens):
            raise DataError(f"{self.folder / INDEX_NAME}: the totals are not those of its shards; {REMEDY}")

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, [BOS] ... [EOS]: a read-only view of the file. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        buffer = self._buffers[int(np.searchsorted(self._shard_ends, index, side="right"))]
        return np.frombuffer(buffer, self._dtype, int(self.lengths_D[index]), int(self._offsets_D[index]))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of token shards; make it with tools/prepare.py")
    try:
        index = json.loads(path.read_bytes())
        if index["__kind__"] != INDEX_KIND:
            raise DataError(f"{path}: kind {index['__kind__']!r} is not {INDEX_KIND}; {REMEDY}")
        index["shardlist"] = [Shard(**shard) for shard in index["shardlist"]]
        if np.dtype(index["dtype"]) != token_dtype(index["vocab_size"]):
            raise DataError(f"{path}: tokens of type {index['dtype']} do not go with its vocab_size; {REMEDY}")
        missing = {"tokenizer_sha256", "documents", "tokens", "bytes"} - index.keys()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; is this a folder made with tools/prepare.py?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of token shards ({error!r}); {REMEDY}") from error
    if missing or not index["shardlist"]:
        raise DataError(f"{path}: lacks {', '.join(sorted(missing)) or 'shards'}; {REMEDY}")
    return index


def _open_shard(path: Path, shard: Shard, verify: bool) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size != shard.filesize:
                raise DataError(f"{path}: {size} bytes instead of {shard.filesize}: truncated or changed; {REMEDY}")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({error}); {REMEDY}") from error
    if verify and hashlib.sha256(buffer).hexdigest() != shard.sha256:
        raise DataError(f"{path}: the content does not match its sha256: damaged or changed; {REMEDY}")
    return buffer
