"""Shards are compared with their index and sidecars, and the first error is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sleeptrain.data.shards import TokenShards
from sleeptrain.errors import DataError
from tests.data.test_shards import flip_byte, offset


@pytest.mark.parametrize("part", [0, 0.5])
def test_truncated_shard(folder: Path, part: float) -> None:
    path = folder / "shard-000000.tar"
    size = path.stat().st_size
    os.truncate(path, int(size * part))
    with pytest.raises(DataError, match=rf"shard-000000\.tar: {int(size * part)} bytes instead of {size}.*restore"):
        TokenShards(folder)


def test_shard_newer_than_the_index(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "shard-000001.tar"
    later = (folder / "index.json").stat().st_mtime_ns + 1
    os.utime(path, ns=(later, later))
    TokenShards(folder)  # a plain copy
    assert "1 shards are newer" in caplog.text
    flip_byte(path, 5000)
    with pytest.raises(DataError, match=r"shard-000001\.tar: changed after its index was written.*tools/shards\.py"):
        TokenShards(folder)
    os.utime(path, ns=(later - 1, later - 1))
    TokenShards(folder)  # not read again


def test_verify_passes_good_shards(shards: TokenShards, folder: Path) -> None:
    assert list(shards.verify()) == [(str(path), None) for path in sorted(folder.glob("*.tar"))]


def test_verify_names_each_problem(shards: TokenShards, folder: Path) -> None:
    at = offset(folder, 0, 1)
    flip_byte(folder / "shard-000000.tar", at)
    flip_byte(folder / "shard-000001.tar", 20)
    flip_byte(folder / "shard-000002.index.npy", 200)
    sound = [where for where, problem in shards.verify() if problem is None]
    problems = [problem for _, problem in shards.verify() if problem is not None]
    assert len(sound) == shards.num_shards - 3
    assert f"shard-000000.tar: document 1 at byte {at} is not the one" in problems[0]
    assert "shard-000001.tar: damaged or no array at byte 0: the header does not match its checksum" in problems[1]
    assert "shard-000002.index.npy: does not match its sha256" in problems[2]


def test_verify_checks_bytes_outside_of_documents(shards: TokenShards, folder: Path) -> None:
    path = folder / "shard-000000.tar"
    flip_byte(path, path.stat().st_size - 1)
    flip_byte(folder / "shard-000001.tar", offset(folder, 1, 0) + 2 * int(shards.lengths(1)[0]))  # padding
    problems = [problem for _, problem in shards.verify() if problem is not None]
    assert ["does not match the sha256" in problem for problem in problems] == [True, True]
