"""Compares shards with their index and sidecars."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sleeptrain.config.overrides import shell_command
from sleeptrain.data.shard_index import INDEX_NAME, Shard, index_name
from sleeptrain.data.tar_index import Member, TarArrays
from sleeptrain.errors import DataError
from sleeptrain.terminal import log_printable

logger = log_printable(__name__)


def check_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Compare the shards in a local folder with their index: size and time of each file.

    A shard that is newer than the index is read and its sha256 compared. Raises DataError, which names the shard.
    """
    indexed = (folder / INDEX_NAME).stat().st_mtime_ns
    newer = []
    for shard in shards:
        path = folder / shard.url
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; restore the file, or {_reindex(folder)}") from error
        if stat.st_size != shard.filesize:
            raise DataError(
                f"{path}: {stat.st_size} bytes instead of {shard.filesize}: truncated or changed; restore the file, or "
                + _reindex(folder)
            )
        if stat.st_mtime_ns > indexed:
            newer.append(shard)
    if newer:
        logger.warning(
            "%s: %d shards are newer than %s and are compared with their sha256 now; after copying a folder, "
            "`touch` its %s",
            folder,
            len(newer),
            INDEX_NAME,
            INDEX_NAME,
        )
    for shard in newer:
        with (folder / shard.url).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise DataError(f"{folder / shard.url}: changed after its index was written; {_reindex(folder)}")


def _reindex(folder: Path) -> str:
    return f"index the folder anew: {shell_command('tools/shards.py', 'index', folder, '--tokenizer', 'PATH')}"


def compare(file: BinaryIO, shard: Shard, records_D: np.ndarray, dtype: np.dtype[Any]) -> str | None:
    """The first error of a shard, read from `file`; None if it is right. records_D: records of its sidecar."""
    members = TarArrays(file)
    number = -1
    try:
        for number, member in enumerate(members):
            if number >= len(records_D) or member.array.dtype != dtype or _record(member) != records_D[number].item():
                return f"document {number} at byte {member.offset} is not the one in {index_name(shard.url)}"
    except ValueError as error:
        return str(error)
    if number + 1 != len(records_D):
        return f"{number + 1} documents instead of {len(records_D)}"
    if members.sha256 != shard.sha256:
        return f"the content does not match the sha256 in {INDEX_NAME}"
    return None


def _record(member: Member) -> tuple[int, int, int]:
    return member.offset, len(member.array), zlib.crc32(member.array.data)
