from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import wids

from sleeptrain.data.shards import TokenShards, token_dtype, write_shards
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import DataError


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_documents_come_back(shards: TokenShards, tokenizer: Tokenizer, texts: list[str]) -> None:
    assert len(list(shards.folder.glob("shard-*.tar"))) >= 3
    assert shards.num_documents == len(texts)
    for index, text in enumerate(texts):
        document = shards.document(index)
        assert document.dtype == np.uint16
        assert document.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert len(document) == shards.lengths_D[index]
    assert shards.num_tokens == shards.lengths_D.sum()
    assert shards.num_bytes == sum(len(text.encode()) for text in texts)
    for index in (-1, len(texts)):
        with pytest.raises(IndexError):
            shards.document(index)


def test_document_is_a_read_only_view(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="read-only"):
        shards.document(0)[0] = 1


def test_index_says_what_is_there(shards: TokenShards, tokenizer: Tokenizer) -> None:
    index = json.loads((shards.folder / "index.json").read_text())
    assert (index["__kind__"], index["wids_version"], index["name"]) == ("wids-shard-index-v1", 1, "test")
    assert (index["dtype"], index["vocab_size"], index["tokenizer_sha256"]) == ("<u2", 320, tokenizer.hash)
    for number, shard in enumerate(index["shardlist"]):
        content = (shards.folder / shard["url"]).read_bytes()
        assert shard["url"] == f"shard-{number:06d}.tar"
        assert shard["filesize"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert sum(shard["nsamples"] for shard in index["shardlist"]) == index["documents"]
    assert sum(shard["tokens"] for shard in index["shardlist"]) == index["tokens"]


def test_webdataset_reads_the_same(shards: TokenShards) -> None:
    urls = [str(path) for path in sorted(shards.folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(shards.num_documents)]
    for index, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["npy"], shards.document(index))


@pytest.mark.filterwarnings("ignore:String specifications:UserWarning")
def test_wids_reads_the_same(shards: TokenShards, tmp_path: Path) -> None:
    dataset = wids.ShardListDataset(str(shards.folder / "index.json"), cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == shards.num_documents
    for index in range(len(dataset)):
        np.testing.assert_array_equal(dataset[index][".npy"], shards.document(index))


def test_same_bytes_every_time(shards: TokenShards, tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    again = write_shards(tmp_path / "again", texts, tokenizer, name="test", shard_bytes=20_000)
    for path in sorted(shards.folder.iterdir()):
        assert (again.folder / path.name).read_bytes() == path.read_bytes()


class WideTokenizer:
    """More ids than 16 bits hold."""

    vocab_size, bos_id, eos_id, hash = 70_000, 2, 3, "wide"

    def encode(self, text: str) -> list[int]:
        return [69_999] * len(text)


def test_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    assert [token_dtype(size).str for size in (2**16 - 1, 2**16)] == ["<u2", "<u4"]
    shards = write_shards(tmp_path / "wide", ["abc"], WideTokenizer(), name="wide")  # type: ignore[arg-type]
    assert shards.document(0).dtype == np.uint32
    assert shards.document(0).tolist() == [2, 69_999, 69_999, 69_999, 3]


def test_failed_writing_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def broken():
        yield "text"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_shards(tmp_path / "shards", broken(), tokenizer, name="test")
    with pytest.raises(DataError, match="no document"):
        write_shards(tmp_path / "shards", [], tokenizer, name="test")
    assert not list(tmp_path.iterdir())


def test_wrong_tokenizer_names_both(shards: TokenShards, tokenizer: Tokenizer) -> None:
    TokenShards(shards.folder, expect_tokenizer=tokenizer.hash)
    with pytest.raises(DataError, match=rf"{tokenizer.hash}.*0123abc.*data\.shards\.tokenizer"):
        TokenShards(shards.folder, expect_tokenizer="0123abc")


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_flipped_token_is_noticed(shards: TokenShards) -> None:
    path = shards.folder / "shard-000001.tar"
    flip_byte(path, 512 + 128 + 2)
    with pytest.raises(DataError, match=r"shard-000001\.tar.*sha256.*prepare"):
        TokenShards(shards.folder)
    TokenShards(shards.folder, verify=False)


@pytest.mark.parametrize("position", [130, 156, 257, 512, 512 + 8, 512 + 24, 512 + 60])
def test_damaged_header_is_noticed_without_reading_all(shards: TokenShards, position: int) -> None:
    flip_byte(shards.folder / "shard-000000.tar", position)
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged at byte 0"):
        TokenShards(shards.folder, verify=False)


def test_truncated_shard(shards: TokenShards) -> None:
    path = shards.folder / "shard-000000.tar"
    content = path.read_bytes()
    for size in (0, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"shard-000000\.tar: {size} bytes instead of {len(content)}"):
            TokenShards(shards.folder, verify=False)


@pytest.mark.parametrize("size", [512, 700, 1024])
def test_tar_without_an_end(shards: TokenShards, size: int) -> None:
    path = shards.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:size])
    edit_index(shards.folder, lambda index: index["shardlist"][0].update(filesize=size))
    with pytest.raises(DataError, match=r"shard-000000\.tar: (damaged|the tar file ends early)"):
        TokenShards(shards.folder, verify=False)


def test_tar_without_its_end_blocks(shards: TokenShards) -> None:
    path = shards.folder / "shard-000000.tar"
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512))
    edit_index(shards.folder, lambda index: index["shardlist"][0].update(filesize=path.stat().st_size))
    with pytest.raises(DataError, match=r"shard-000000\.tar: the tar file ends early"):
        TokenShards(shards.folder, verify=False)


def test_missing_pieces(shards: TokenShards, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        TokenShards(tmp_path / "nowhere")
    (shards.folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        TokenShards(shards.folder)
    (shards.folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json"):
        TokenShards(shards.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("shardlist"),
        lambda index: index.pop("documents"),
        lambda index: index.update(shardlist=[]),
        lambda index: index["shardlist"][0].pop("sha256"),
        lambda index: index.update(__kind__="other"),
        lambda index: index.update(dtype="<u4"),
        lambda index: index.update(tokens=index["tokens"] + 1),
        lambda index: index["shardlist"].pop(),
    ],
)
def test_bad_index(shards: TokenShards, change: Callable[[dict], object]) -> None:
    edit_index(shards.folder, change)
    with pytest.raises(DataError, match=r"index\.json"):
        TokenShards(shards.folder)


def test_index_that_is_no_json(shards: TokenShards) -> None:
    for content in ("{", "[]", "7"):
        (shards.folder / "index.json").write_text(content)
        with pytest.raises(DataError, match=r"index\.json: not an index"):
            TokenShards(shards.folder)


def test_swapped_shards_are_noticed(shards: TokenShards) -> None:
    edit_index(shards.folder, lambda index: index["shardlist"][0].update(nsamples=1))
    with pytest.raises(DataError, match=r"shard-000000\.tar: holds other documents"):
        TokenShards(shards.folder)
