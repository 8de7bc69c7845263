"""Fixtures of data and training for the tests of the commands."""

from tests.data.conftest import shards, texts, tokenizer
from tests.train.conftest import tiny_shards

__all__ = ["shards", "texts", "tiny_shards", "tokenizer"]
