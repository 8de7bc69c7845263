"""The description of a folder of token shards: `index.json` for all shards, a sidecar for the documents of each.

`index.json` has the format of wids, plus the sha256 and token count of each shard, the sha256 of its sidecar, the
tokenizer's sha256 and the totals. The sidecar of `shard-000000.tar` is `shard-000000.index.npy`, with one record of 16
bytes for each document.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sleeptrain.errors import DataError
from sleeptrain.files import write_whole
from sleeptrain.small_files import parse_json

INDEX_NAME = "index.json"
INDEX_KIND = "wids-shard-index-v1"
SHARD_SUFFIX = ".tar"
SIDECAR_SUFFIX = ".index.npy"
# offset: byte position of the document's first token in the tar. length: tokens. crc32: zlib's, of the tokens' bytes.
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
NPY_1_0 = b"\x93NUMPY\x01\x00"  # first bytes of a .npy file


INDEX_REMEDY = "make it anew with tools/prepare.py, or index the tar files with tools/shards.py index"
# Names and checksums become parts of paths, URLs and shell commands.
SHARD_NAME = re.compile(r"[\w@%+=-][\w.,@%+=-]*\.tar", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file.

    url: its name in the folder of the index.
    nsamples: documents.
    filesize: bytes.
    sha256: of the file.
    tokens: with BOS and EOS.
    index_sha256: sha256 of its sidecar.
    """

    url: str
    nsamples: int
    filesize: int
    sha256: str
    tokens: int
    index_sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json. tokens: with BOS and EOS. bytes: bytes of the text, 0 if unknown."""

    name: str
    shards: tuple[Shard, ...]
    dtype: np.dtype[Any]
    vocab_size: int
    tokenizer_hash: str
    documents: int
    tokens: int
    bytes: int


def index_name(url: str) -> str:
    """The name of a shard's sidecar: `shard-000000.tar` has `shard-000000.index.npy`."""
    return url.removesuffix(SHARD_SUFFIX) + SIDECAR_SUFFIX


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The little-endian integer type of tokens in a shard: uint16, or uint32 for 65,536 ids and more."""
    return np.dtype("<u2") if vocab_size < 2**16 else np.dtype("<u4")


def sidecar_bytes(records_D: np.ndarray) -> bytes:
    """The content of a sidecar file; `records_D` is of type RECORD."""
    content = io.BytesIO()
    np.lib.format.write_array(content, records_D, version=(1, 0), allow_pickle=False)
    return content.getvalue()


def parse_sidecar(content: bytes, shard: Shard) -> bytes:
    """The records of a sidecar file, 16 bytes for each document. Raises ValueError: damaged, or not of this shard."""
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise ValueError("does not match its sha256: damaged or changed")
    # Not numpy's reader: it compiles the header, and CPython 3.11 fails if two threads do so at once.
    start = 10 + int.from_bytes(content[8:10], "little")
    if content[:8] != NPY_1_0 or repr(RECORD.descr).encode() not in content[10:start]:
        raise ValueError("is no sidecar of a shard")
    records_D = np.frombuffer(content, RECORD, offset=start)
    if len(records_D) != shard.nsamples:
        raise ValueError(f"holds other documents than {INDEX_NAME} says")
    if records_D["length"].sum(dtype=np.int64) != shard.tokens:
        raise ValueError(f"holds other tokens than {INDEX_NAME} says")
    return records_D.tobytes()


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    *,
    name: str,
    vocab_size: int,
    tokenizer_hash: str,
    num_bytes: int,
    dtype: np.dtype[Any] | None = None,
) -> None:
    """Write `folder`/index.json, whole or not at all, with the shards in the order of their names.

    num_bytes: bytes of the shards' text, 0 if unknown. dtype: type of the tokens, by default `token_dtype(vocab_size)`.
    """
    ordered = sorted(shards, key=lambda shard: shard.url)
    index = {
        "__kind__": INDEX_KIND,
        "wids_version": 1,
        "name": name,
        "shardlist": [asdict(shard) for shard in ordered],
        "dtype": (token_dtype(vocab_size) if dtype is None else dtype).str,
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_hash,
        "documents": sum(shard.nsamples for shard in ordered),
        "tokens": sum(shard.tokens for shard in ordered),
        "bytes": num_bytes,
    }
    write_whole(Path(folder) / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())


def parse_index(content: bytes, where: str) -> ShardIndex:
    """The index in `content`. Raises DataError, which names `where`: not an index, or one that contradicts itself."""
    try:
        raw = parse_json(content)
        if not isinstance(raw, dict):
            raise ValueError("it is no object")
        if raw["__kind__"] != INDEX_KIND:
            raise ValueError(f"kind {raw['__kind__']!r} is not {INDEX_KIND}")
        index = ShardIndex(
            name=str(raw["name"]),
            shards=tuple(_parse_shard(entry) for entry in raw["shardlist"]),
            dtype=np.dtype(raw["dtype"]),
            vocab_size=_count(raw, "vocab_size"),
            tokenizer_hash=str(raw["tokenizer_sha256"]),
            documents=_count(raw, "documents"),
            tokens=_count(raw, "tokens"),
            bytes=_count(raw, "bytes", least=0),
        )
        _check(index)
    except KeyError as error:
        raise DataError(f"{where}: lacks {error}; {INDEX_REMEDY}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not an index of token shards ({error}); {INDEX_REMEDY}") from error
    return index


def _count(entry: dict[str, Any], key: str, least: int = 1) -> int:
    value = entry[key]
    if type(value) is not int or value < least:
        raise ValueError(f"{key} is {value!r}" + (" in an empty shard" if key in ("nsamples", "filesize") else ""))
    return value


def is_shard(entry: Any) -> bool:
    """True if a JSON value has the fields of a valid `Shard` and no others."""
    try:
        return asdict(_parse_shard(entry)) == entry
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def _parse_shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**{field.name: entry[field.name] for field in fields(Shard)})
    for key in ("nsamples", "filesize", "tokens"):
        _count(entry, key)
    if not SHARD_NAME.fullmatch(shard.url):
        raise ValueError(f"{shard.url!r} is no name of a tar file beside the index")
    if not (SHA256.fullmatch(shard.sha256) and SHA256.fullmatch(shard.index_sha256)):
        raise ValueError(f"{shard.url} has no sha256")
    return shard


def _check(index: ShardIndex) -> None:
    if not index.shards:
        raise ValueError("no shards")
    for before, after in pairwise(shard.url for shard in index.shards):
        if before >= after:
            raise ValueError(f"{after} comes after {before}: the shards are not sorted by name, or doubled")
    if index.dtype.str not in ("<u2", "<u4") or index.vocab_size > 2 ** (8 * index.dtype.itemsize):
        raise ValueError(f"tokens of type {index.dtype.str} do not go with vocab_size {index.vocab_size}")
    for total, field in (("documents", "nsamples"), ("tokens", "tokens")):
        if getattr(index, total) != sum(getattr(shard, field) for shard in index.shards):
            raise ValueError(f"{total} is not the total of its shards")
