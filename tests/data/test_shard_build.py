"""Existing tar files become shards if they hold nothing but token arrays in order."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import webdataset

from sleeptrain.data.shard_build import index_folder
from sleeptrain.data.shard_index import Shard, write_index
from sleeptrain.data.shards import TokenShards
from sleeptrain.errors import DataError


class Ids(NamedTuple):
    vocab_size: int = 100
    hash: str = "a" * 64


def write_tar(path: Path, samples: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for key, array in samples.items():
            tar.write({"__key__": key, "npy": array})


def ids(*values: int, dtype: str = "<u2") -> np.ndarray:
    return np.array(values, dtype)


def test_every_tar_file_becomes_a_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "corpus" / "b.tar", {"2": ids(7)})
    write_tar(tmp_path / "corpus" / "a.tar", {"0": ids(1, 2, 3), "1": ids(99)})
    reported: list[Shard] = []
    made = index_folder(tmp_path / "corpus", Ids(), done=reported.append)
    assert made == reported and [(shard.url, shard.nsamples, shard.tokens) for shard in made] == [
        ("a.tar", 2, 4),
        ("b.tar", 1, 1),
    ]
    shards = TokenShards(tmp_path / "corpus", expect_tokenizer="a" * 64)
    assert [shards.document(*at).tolist() for at in ((0, 0), (0, 1), (1, 0))] == [[1, 2, 3], [99], [7]]
    assert shards.num_bytes == 0 and '"name": "corpus"' in (tmp_path / "corpus/index.json").read_text()


@pytest.mark.parametrize("same_tokenizer", [True, False])
def test_an_old_index_keeps_its_name_and_for_the_same_tokens_its_bytes(tmp_path: Path, same_tokenizer: bool) -> None:
    write_tar(tmp_path / "a.tar", {"0": ids(1, 2, 3)})
    shards = index_folder(tmp_path, Ids())
    write_index(
        tmp_path, shards, name="old", vocab_size=100, tokenizer_hash="a" * 64, num_bytes=55, dtype=np.dtype("<u2")
    )
    index_folder(tmp_path, Ids(hash=("a" if same_tokenizer else "b") * 64))
    assert '"name": "old"' in (tmp_path / "index.json").read_text()
    assert TokenShards(tmp_path).num_bytes == (55 if same_tokenizer else 0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"0": ids(1), "1": ids(100)}, "'1', at byte .* holds id 100, but the tokenizer has 100 ids"),
        ({"1": ids(1), "0": ids(2)}, "'0', at byte .* comes after '1'; keys must ascend"),
        ({"0": ids(1), "1": ids()}, "'1', at byte .* holds no token"),
        ({"0": ids(1, dtype="<i8")}, "'0', at byte .* is of type <i8"),
        ({"0": ids(1), "1": ids(1, dtype="<u4")}, "'1', at byte .* is of type <u4; all documents must be of one type"),
        ({}, "an empty tar file; remove it"),
    ],
)
def test_other_content_is_named(tmp_path: Path, samples: dict[str, np.ndarray], message: str) -> None:
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=rf"a\.tar: {message}"):
        index_folder(tmp_path, Ids())


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tar file here"):
        index_folder(tmp_path, Ids())
    write_tar(tmp_path / "a.tar", {"0": ids(1)})
    (tmp_path / "b.tar").hardlink_to(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"b\.tar is the file a\.tar: its documents would count double"):
        index_folder(tmp_path, Ids())
    (tmp_path / "b.tar").rename(tmp_path / "a b.tar")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="a shard's name has letters, digits"):
        index_folder(tmp_path, Ids())
