"""The held-out rows of a calibration: half of them choose thresholds, the other half judge what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sleeptrain.config.schema import Config, DataConfig
from sleeptrain.data.batch import Batch
from sleeptrain.data.source import Source, build_source
from sleeptrain.errors import ConfigError
from sleeptrain.train.evaluate import held_out, rows_of_a_batch

# The rows of a half: every second row of each held-out set, counted from its first.
CALIBRATION, JUDGED = range(2)
RULE = "rows 0, 2, 4, ... of each held-out set choose thresholds, rows 1, 3, 5, ... judge them"

Sets = Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class Halves:
    """The batches of each held-out set, without a row in common."""

    calibration: Sets
    judged: Sets


def held_out_rows(source: Source, config: Config, num_rows: int | None = None) -> dict[str, list[Batch]]:
    """The held-out rows of each set, in batches of an evaluation.

    num_rows: rows of each set; a task makes as many as that, whatever its `validation_samples`. None: the rows of the
    run's evaluations. Raises ConfigError if a set has fewer.
    """
    if num_rows is None:
        return {name: list(batches) for name, batches in held_out(source, config).items()}
    if num_rows < 2:
        raise ConfigError("--rows must be at least 2: half of the rows choose thresholds, the others judge them")
    size = rows_of_a_batch(source, config)
    if source.task is not None:
        source = build_source(_with_samples(config.data, num_rows))
    sets = {name: list(source.validation_batches(name, size, -(-num_rows // size))) for name in source.held_out}
    for name, batches in sets.items():
        found = sum(len(batch.tokens_BT) for batch in batches)
        if found < num_rows:
            raise ConfigError(f"the held-out set {name} has {found} rows: ask for at most as many with --rows")
        batches[-1] = batches[-1].rows(0, len(batches[-1].tokens_BT) - (found - num_rows))
    return sets


def _with_samples(data: DataConfig, num_rows: int) -> DataConfig:
    return replace(data, **{data.source: replace(getattr(data, data.source), validation_samples=num_rows)})


def halves(sets: Sets) -> Halves:
    """The rows of each half, in batches of the same size. Raises ConfigError for a set of one row."""
    for name, batches in sets.items():
        if sum(len(batch.tokens_BT) for batch in batches) < 2:
            raise ConfigError(f"a calibration needs at least two held-out rows, and the set {name} has fewer")
    return Halves(*({name: _half(batches, first) for name, batches in sets.items()} for first in (CALIBRATION, JUDGED)))


def _half(batches: Sequence[Batch], first: int) -> list[Batch]:
    fields, size = Batch.__dataclass_fields__, len(batches[0].tokens_BT)
    half = Batch(*(torch.cat([getattr(batch, name) for batch in batches])[first::2] for name in fields))
    return [half.rows(begin, begin + size) for begin in range(0, len(half.tokens_BT), size)]
