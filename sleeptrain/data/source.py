"""Sources of batches: the interface for training, and the choice by `data.source`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sleeptrain.config.schema import DataConfig, ShardsConfig
from sleeptrain.data.ahead import never
from sleeptrain.data.assignment import MixtureShares, StreamSettings
from sleeptrain.data.batch import Batch, Part
from sleeptrain.data.mixture import shares
from sleeptrain.data.position import check_position
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.storage import Cache
from sleeptrain.data.stream import ShardStream
from sleeptrain.data.tasks.build import build_task
from sleeptrain.data.tasks.source import TaskSource
from sleeptrain.data.tasks.task import Task
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.data.validation import validation_batches
from sleeptrain.errors import DataError


class Source(Protocol):
    """An endless, resumable stream of training batches, and held-out batches that stay the same.

    task: the task of the rows, which scores answers; None for text.
    sequence: T, tokens of a row.
    vocab_size: ids are below it.
    tokenizer_hash: hash of the tokenizer, None for a task whose ids are no text.
    part: the rows that this process reads.
    held_out: names of the held-out sets.
    """

    @property
    def task(self) -> Task | None: ...

    @property
    def sequence(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def tokenizer_hash(self) -> str | None: ...

    @property
    def part(self) -> Part: ...

    @property
    def held_out(self) -> Sequence[str]: ...

    def batch(self, rows: int) -> Batch:
        """This process's rows of the next training batch, which has `rows` rows in all.

        Raises Cancelled if the run was asked to stop during the wait; the position may have moved then.
        """

    def skip(self, rows: int) -> None:
        """Move the position as `batch(rows)` does, without reading."""

    def validation_batches(self, name: str, rows: int, count: int | None = None) -> Iterator[Batch]:
        """The first `count` batches (None: all) of a held-out set, the same at each call; the last may be smaller."""

    def report(self) -> dict[str, Any]:
        """Values of the position for the log, by name."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the training stream, as integers, with the identity of the data and settings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; later batches are bitwise equal. Raises DataError: other data or settings."""


class ShardsSource:
    """Token shards of one source or a mixture, with the held-out sets of the sources that have one.

    Raises DataError for missing, damaged or mismatched shards and tokenizers, ConfigError for impossible weights.
    """

    task = None

    def __init__(self, config: DataConfig, part: Part | None = None, stop: Callable[[], bool] = never) -> None:
        shards = config.shards
        tokenizer = load_tokenizer(Path(shards.tokenizer)).hash if shards.tokenizer else None
        cache = Cache(shards.cache, shards.cache_gib)
        self.train = {source.name: TokenShards(source.train, tokenizer, cache) for source in shards.sources}
        named = [source for source in shards.sources if source.validation]
        self._validation = {source.name: TokenShards(source.validation, tokenizer, cache) for source in named}
        _refuse_other_tokenizers([*self.train.values(), *self._validation.values()])
        settings = StreamSettings(config.sequence, mixture_stages(shards), config.layout, config.seed, shards.shuffle)
        self.part = part or Part()
        skips = shards.on_damage == "skip"
        self.stream = ShardStream(self.train, settings, self.part, shards.workers, skips, stop)
        self.sequence = config.sequence
        first = next(iter(self.train.values()))
        self.vocab_size, self.tokenizer_hash = first.vocab_size, first.tokenizer_hash
        self.held_out = list(self._validation)

    def batch(self, rows: int) -> Batch:
        return self.stream.batch(rows)

    def skip(self, rows: int) -> None:
        self.stream.next_step(rows)

    def validation_batches(self, name: str, rows: int, count: int | None = None) -> Iterator[Batch]:
        return validation_batches(self._validation[name], self.sequence, rows, count)

    def report(self) -> dict[str, Any]:
        """epochs: how often each source has been read. damaged: number of skipped documents, if any."""
        damaged = len(self.stream.assembler.damaged)
        return {"epochs": self.stream.epochs()} | ({"damaged": damaged} if damaged else {})

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict() | self._held_out_data()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_position(state, self._held_out_data())
        self.stream.load_state_dict(state)

    def _held_out_data(self) -> dict[str, Any]:
        """The identity of the held-out data, which must stay the same in a run."""
        return {"held-out data": {name: shards.fingerprint for name, shards in self._validation.items()}}


def mixture_stages(config: ShardsConfig) -> list[MixtureShares]:
    """The sources' shares in each stage. Raises ConfigError for weights that `shares` refuses."""
    base = {source.name: source.weight for source in config.sources}
    none = dict.fromkeys(base, 0.0)
    stages: list[tuple[int, Mapping[str, float]]] = [(0, base)]
    stages += [(stage.tokens, none | stage.weights) for stage in config.curriculum]
    return [MixtureShares(tokens, shares(weights)) for tokens, weights in stages]


def _refuse_other_tokenizers(all_shards: Sequence[TokenShards]) -> None:
    first = all_shards[0]
    for shards in all_shards[1:]:
        if (shards.tokenizer_hash, shards.vocab_size) != (first.tokenizer_hash, first.vocab_size):
            raise DataError(
                f"{shards.location} was made with another tokenizer (sha256 {shards.tokenizer_hash}, "
                f"{shards.vocab_size} ids) than {first.location} ({first.tokenizer_hash}, {first.vocab_size} ids): "
                "make all sources of a mixture with one tokenizer (tools/prepare.py --tokenizer)"
            )


def build_source(config: DataConfig, part: Part | None = None, stop: Callable[[], bool] = never) -> Source:
    """The source that `data.source` names.

    part: the rows that this data-parallel rank reads; None: all. stop: true if waiting for data must end.

    Raises ConfigError for an unknown source, and the errors of the source.
    """
    if config.source == "shards":
        return ShardsSource(config, part, stop)
    return TaskSource(build_task(config), config.seed, part)
