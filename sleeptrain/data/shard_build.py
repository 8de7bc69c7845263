"""Makes token shards from existing tar files: writes their sidecars and `index.json`."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sleeptrain.data.shard_index import (
    INDEX_NAME,
    RECORD,
    SHARD_NAME,
    Shard,
    index_name,
    parse_index,
    sidecar_bytes,
    write_index,
)
from sleeptrain.data.tar_index import Member, TarArrays
from sleeptrain.errors import DataError
from sleeptrain.files import write_whole
from sleeptrain.plain_files import require_plain, same_file

TOKEN_TYPES = ("<u2", "<u4")


class Vocabulary(Protocol):
    """The part of a tokenizer that indexing needs."""

    vocab_size: int
    hash: str


def index_folder(
    folder: Path, tokenizer: Vocabulary, name: str | None = None, done: Callable[[Shard], None] = lambda shard: None
) -> list[Shard]:
    """Write the sidecar of each tar file in `folder`, then index.json; every file is read once, in full.

    A tar file holds one-dimensional `.npy` arrays of uint16 or uint32 (the same type in all files) with ids of
    `tokenizer`, in ascending order of keys. name: name of the corpus, by default the name in an existing index, else
    the folder's name. done: called after each file. Raises DataError, which names file and byte, for any other content.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: no tar file here")
    shards: list[Shard] = []
    dtype: np.dtype[Any] | None = None
    seen: dict[Any, Path] = {}
    for path in paths:
        require_plain(path)
        if (file_key := same_file(path)) in seen:
            raise DataError(
                f"{path} is the file {seen[file_key].name}: its documents would count double; remove one name"
            )
        seen[file_key] = path
        if not SHARD_NAME.fullmatch(path.name):
            raise DataError(f"{path}: a shard's name has letters, digits and .,_@%+=- only; rename the file")
        shard, dtype = _index_shard(path, tokenizer.vocab_size, dtype)
        shards.append(shard)
        done(shard)
    name, num_bytes = _from_old_index(folder, shards, tokenizer.hash, name)
    write_index(
        folder,
        shards,
        name=name,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        num_bytes=num_bytes,
        dtype=dtype,
    )
    return shards


def _index_shard(path: Path, vocab_size: int, dtype: np.dtype[Any] | None) -> tuple[Shard, np.dtype[Any]]:
    """Write the sidecar of one tar file. dtype: token type of the earlier files, None for the first."""
    records: list[tuple[int, int, int]] = []
    last_key = ""
    try:
        with path.open("rb") as file:
            members = TarArrays(file)
            for member in members:
                dtype = dtype or member.array.dtype
                _check(member, last_key, vocab_size, dtype)
                last_key = member.key
                records.append((member.offset, len(member.array), zlib.crc32(member.array.data)))
        if dtype is None or not records:
            raise ValueError("an empty tar file; remove it")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    sidecar = sidecar_bytes(np.array(records, RECORD))
    write_whole(path.with_name(index_name(path.name)), sidecar)
    shard = Shard(
        url=path.name,
        nsamples=len(records),
        filesize=members.size,
        sha256=members.sha256,
        tokens=sum(length for _, length, _ in records),
        index_sha256=hashlib.sha256(sidecar).hexdigest(),
    )
    return shard, dtype


def _check(member: Member, last_key: str, vocab_size: int, dtype: np.dtype[Any]) -> None:
    where = f"{member.key!r}, at byte {member.offset},"
    tokens = member.array
    if tokens.dtype.str not in TOKEN_TYPES or tokens.dtype != dtype:
        raise ValueError(f"{where} is of type {tokens.dtype.str}; all documents must be of one type, uint16 or uint32")
    if member.key <= last_key:
        raise ValueError(f"{where} comes after {last_key!r}; keys must ascend, without doubles")
    if not len(tokens):
        raise ValueError(f"{where} holds no token")
    if tokens.max() >= vocab_size:
        raise ValueError(f"{where} holds id {tokens.max()}, but the tokenizer has {vocab_size} ids")


def _from_old_index(folder: Path, shards: list[Shard], tokenizer_hash: str, name: str | None) -> tuple[str, int]:
    """(name, bytes of text). Only an old index of the same documents knows the bytes; 0 if there is none."""
    try:
        earlier = parse_index((folder / INDEX_NAME).read_bytes(), str(folder / INDEX_NAME))
    except (OSError, DataError):
        return name or folder.resolve().name, 0
    same = [shard.sha256 for shard in earlier.shards] == [shard.sha256 for shard in shards]
    return name or earlier.name, earlier.bytes if same and earlier.tokenizer_hash == tokenizer_hash else 0
