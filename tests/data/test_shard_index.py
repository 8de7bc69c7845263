from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.data.shard_index import Shard, index_name, parse_index, write_index
from sleeptrain.errors import DataError

SHARDS = [Shard(f"shard-{number:06d}.tar", 3, 1024, "a" * 64, 10, "b" * 64) for number in range(3)]


@pytest.fixture
def index(tmp_path: Path) -> dict[str, Any]:
    write_index(tmp_path, SHARDS[::-1], name="test", vocab_size=300, tokenizer_hash="hash", num_bytes=50)
    return json.loads((tmp_path / "index.json").read_bytes())


def parse(index: Any) -> Any:
    return parse_index(json.dumps(index).encode(), "index.json")


def test_an_index_is_read_back_sorted(index: dict[str, Any], tmp_path: Path) -> None:
    parsed = parse(index)
    assert list(parsed.shards) == SHARDS
    assert (parsed.name, parsed.dtype.str, parsed.vocab_size, parsed.tokenizer_hash) == ("test", "<u2", 300, "hash")
    assert (parsed.documents, parsed.tokens, parsed.bytes) == (9, 30, 50)
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_sidecar_has_its_shards_name() -> None:
    assert index_name("shard-000012.tar") == "shard-000012.index.npy"


def first(**change: Any) -> Callable[[dict], object]:
    return lambda index: index["shardlist"][0].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("shardlist"), "lacks 'shardlist'"),
        (lambda index: index.pop("documents"), "lacks 'documents'"),
        (lambda index: index["shardlist"][0].pop("sha256"), "lacks 'sha256'"),
        (lambda index: index["shardlist"][0].pop("index_sha256"), r"lacks 'index_sha256'; .*tools/shards\.py index"),
        (lambda index: index.update(shardlist=[]), "no shards"),
        (lambda index: index.update(__kind__="other"), "kind 'other' is not wids-shard-index-v1"),
        (lambda index: index.update(dtype="<i8"), "<i8 do not go with vocab_size 300"),
        (lambda index: index.update(vocab_size=70_000), "<u2 do not go with vocab_size 70000"),
        (lambda index: index.update(vocab_size="300"), "vocab_size is '300'"),
        (lambda index: index.update(tokens=31), "tokens is not the total"),
        (lambda index: index.update(documents=8), "documents is not the total"),
        (lambda index: index["shardlist"].pop(), "documents is not the total"),
        (lambda index: index["shardlist"].reverse(), "shard-000001.tar comes after shard-000002.tar"),
        (lambda index: index["shardlist"].insert(0, index["shardlist"][0]), "or doubled"),
        (first(nsamples=0), "nsamples is 0 in an empty shard"),
        (first(filesize=0), "filesize is 0 in an empty shard"),
        (first(tokens=0), "tokens is 0"),
        (first(url="../shard-000000.tar"), "no name of a tar file"),
        (first(url="a;b.tar"), "no name of a tar file"),
        (first(url="shard-000000"), "no name of a tar file"),
        (first(sha256="../../x"), "has no sha256"),
        (first(index_sha256=""), "has no sha256"),
        (first(url=7), "not an index"),
    ],
)
def test_bad_index(index: dict[str, Any], change: Callable[[dict], object], message: str) -> None:
    change(index)
    with pytest.raises(DataError, match=f"^index.json: .*{message}"):
        parse(index)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff"])
def test_index_that_is_no_json(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^index\.json: not an index .*prepare"):
        parse_index(content, "index.json")


def test_wide_tokens_of_a_small_vocabulary_are_allowed(index: dict[str, Any]) -> None:
    index["dtype"] = "<u4"
    assert parse(index).dtype.itemsize == 4
