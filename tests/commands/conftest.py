"""Fixtures of the data and of the training that the commands' tests share."""

from tests.data.conftest import shards, texts, tokenizer
from tests.train.conftest import tiny_shards

__all__ = ["shards", "texts", "tiny_shards", "tokenizer"]
