"""Where batches come from: the interface that training sees, and the choice by `data.source`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sleeptrain.config.schema import DataConfig
from sleeptrain.data.batch import Batch
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.stream import LaneStream
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.data.validation import validation_batches
from sleeptrain.errors import ConfigError
from sleeptrain.tasks.rule110 import Rule110Source


class Source(Protocol):
    """An endless, resumable stream of training batches, and validation batches that stay the same.

    sequence: T, tokens of a row. vocab_size: ids are below it.
    """

    @property
    def sequence(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def batch(self, rows: int) -> Batch:
        """The next training batch, `rows` rows of `sequence` tokens."""

    def validation_batches(self, rows: int, count: int | None = None) -> Iterator[Batch]:
        """At most `count` held-out batches (all without it), anew at each call; the last one may have fewer rows."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the training stream: integers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the batches from there on are the same bit for bit. Raises DataError: other data."""


class ShardsSource:
    """Token shards: lane packing for training, documents from their beginning for validation.

    Raises ConfigError for a path that is not set, DataError for missing, damaged or mismatched shards and tokenizer.
    """

    def __init__(self, config: DataConfig) -> None:
        for name in ("train", "validation", "tokenizer"):
            if not getattr(config.shards, name):
                raise ConfigError(f"data.shards.{name} is not set: name what tools/prepare.py wrote")
        self.tokenizer = Tokenizer(Path(config.shards.tokenizer))
        self._validation = TokenShards(Path(config.shards.validation), expect_tokenizer=self.tokenizer.hash)
        train = TokenShards(Path(config.shards.train), expect_tokenizer=self.tokenizer.hash)
        self._stream = LaneStream(train, config.sequence, config.seed)
        self.sequence = config.sequence
        self.vocab_size = self.tokenizer.vocab_size

    def batch(self, rows: int) -> Batch:
        return self._stream.batch(rows)

    def validation_batches(self, rows: int, count: int | None = None) -> Iterator[Batch]:
        return validation_batches(self._validation, self.sequence, rows, count)

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)


def build_source(config: DataConfig) -> Source:
    """The source that `data.source` names. Raises ConfigError for an unknown one, and what the source itself raises."""
    if config.source == "shards":
        return ShardsSource(config)
    if config.source == "rule110":
        return Rule110Source(config.rule110, config.seed)
    raise ConfigError(f"data.source={config.source!r} is unknown: set shards or rule110")
