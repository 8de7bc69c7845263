"""Small corpora, tokenizers and shards for the tests of the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.storage import Cache
from sleeptrain.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.texts import make_texts


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(40)


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def shards(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> TokenShards:
    """The texts in several shards under `tmp_path / "shards"`."""
    return write_shards(tmp_path / "shards", texts, tokenizer, name="test", shard_bytes=20_000)


@pytest.fixture
def folder(shards: TokenShards, tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The same shards in an object store."""
    url = "memory://bucket/train"
    filesystem = fsspec.filesystem("memory")
    for path in folder.iterdir():
        filesystem.pipe(f"{url}/{path.name}", path.read_bytes())
    yield url
    filesystem.rm(url, recursive=True)
