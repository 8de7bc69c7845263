from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from sleeptrain.data.shards import Shard, ShardWriter, TokenShards, index_name, token_dtype, write_index, write_shards
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError

DTYPE = np.dtype("<u2")
# Short, with a folder, over the 100 bytes of a tar header's name, not ASCII: the last two take extended headers.
KEYS = ["a", "b/000", "c" * 150, "d/é"]


def write(folder: Path, keys: list[str], shard_bytes: int = 10**6) -> list[Shard]:
    writer = ShardWriter(folder, DTYPE, shard_bytes)
    for number, key in enumerate(keys):
        writer.add(key, np.arange(3 + number, dtype=DTYPE))
    return writer.close()


def test_sidecar_says_where_the_tokens_are(tmp_path: Path) -> None:
    [shard] = write(tmp_path, KEYS)
    content = (tmp_path / shard.url).read_bytes()
    records = np.load(tmp_path / "shard-000000.index.npy")
    assert records.dtype.itemsize == 16
    assert records["length"].tolist() == [3, 4, 5, 6]
    for record in records:
        data = content[int(record["offset"]) :][: 2 * int(record["length"])]
        assert data == np.arange(record["length"], dtype=DTYPE).tobytes()
        assert record["crc32"] == zlib.crc32(data)
    assert shard == Shard(
        "shard-000000.tar",
        4,
        len(content),
        hashlib.sha256(content).hexdigest(),
        18,
        hashlib.sha256((tmp_path / index_name(shard.url)).read_bytes()).hexdigest(),
    )


def test_any_tar_reader_finds_the_arrays(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"{key}.npy" for key in KEYS]
        for number, member in enumerate(members):
            file = tar.extractfile(member)
            assert file is not None
            assert np.load(io.BytesIO(file.read())).tolist() == list(range(3 + number))


def test_shards_equal_those_that_webdataset_writes(tmp_path: Path) -> None:
    keys = [*KEYS, "e" * 96, "e" * 97, "f" * 300]
    write(tmp_path, keys)
    with (tmp_path / "webdataset.tar").open("wb") as file, webdataset.TarWriter(file, mtime=0) as tar:
        for number, key in enumerate(keys):
            tar.write({"__key__": key, "npy": np.arange(3 + number, dtype=DTYPE)})
    assert (tmp_path / "shard-000000.tar").read_bytes() == (tmp_path / "webdataset.tar").read_bytes()


def test_a_full_shard_is_followed_by_another(tmp_path: Path) -> None:
    shards = write(tmp_path, [f"{number:03d}" for number in range(10)], shard_bytes=3 * 1024)
    assert [shard.nsamples for shard in shards] == [3, 3, 3, 1]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [shard.url for shard in shards]
    assert all(shard.filesize % tarfile.RECORDSIZE == 0 for shard in shards)


def test_nothing_written_gives_no_shard(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path, DTYPE).close() == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["", "a.b", "folder/", "b/a.", "a\0"])
def test_no_webdataset_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="no webdataset key"):
        ShardWriter(tmp_path, DTYPE).add(key, np.arange(3, dtype=DTYPE))


@pytest.mark.parametrize("keys", [["b", "a"], ["a", "a"], ["9", "10"]])
@pytest.mark.parametrize("shard_bytes", [1, 10**6])
def test_keys_must_ascend_over_all_shards(tmp_path: Path, keys: list[str], shard_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"'{keys[1]}' does not ascend: the one before is '{keys[0]}'"):
        write(tmp_path, keys, shard_bytes)


@pytest.mark.parametrize("tokens", [np.arange(3), np.zeros(0, DTYPE), np.zeros((2, 2), DTYPE)])
def test_tokens_of_another_type_or_none(tmp_path: Path, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"'a' is .* not <u2\[D\]"):
        ShardWriter(tmp_path, DTYPE).add("a", tokens)


def test_a_view_is_written_as_its_own_elements(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, DTYPE)
    writer.add("a", np.arange(10, dtype=DTYPE)[::3])
    write_index(tmp_path, writer.close(), name="x", vocab_size=10, tokenizer_hash="h", num_bytes=1)
    assert TokenShards(tmp_path).document(0, 0).tolist() == [0, 3, 6, 9]


def test_shards_may_be_renamed(tmp_path: Path) -> None:
    [shard] = write(tmp_path, ["a", "b"])
    renamed = replace(shard, url="shard-000007.tar")
    for name in (lambda url: url, index_name):
        (tmp_path / name(shard.url)).rename(tmp_path / name(renamed.url))
    write_index(tmp_path, [renamed], name="x", vocab_size=10, tokenizer_hash="h", num_bytes=1)
    assert TokenShards(tmp_path).document(0, 1).tolist() == [0, 1, 2, 3]


def test_same_bytes_every_time(shards: TokenShards, tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    write_shards(tmp_path / "again", texts, tokenizer, name="test", shard_bytes=20_000)
    for path in sorted((tmp_path / "shards").iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


class WideTokenizer:
    """More ids than 16 bits hold, and no BOS."""

    vocab_size, bos_id, eos_id, hash = 70_000, None, 3, "wide"

    def encode(self, text: str) -> list[int]:
        return [69_999] * len(text)


def test_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    assert [token_dtype(size).str for size in (2**16 - 1, 2**16)] == ["<u2", "<u4"]
    shards = write_shards(tmp_path / "wide", ["abc"], WideTokenizer(), name="wide")  # type: ignore[arg-type]
    assert shards.document(0, 0).dtype == np.uint32
    assert shards.document(0, 0).tolist() == [69_999, 69_999, 69_999, 3]


def test_a_failed_write_leaves_no_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def broken():
        yield "text"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_shards(tmp_path / "shards", broken(), tokenizer, name="test")
    with pytest.raises(DataError, match="no document"):
        write_shards(tmp_path / "shards", [], tokenizer, name="test")
    assert not list(tmp_path.iterdir())
