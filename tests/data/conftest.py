"""Small corpora, tokenizers and shards for the tests of the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.data.shards import TokenShards, write_shards
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
