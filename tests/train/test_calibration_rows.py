from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.data.batch import Batch
from sleeptrain.data.source import build_source
from sleeptrain.data.tasks.build import build_task
from sleeptrain.errors import ConfigError
from sleeptrain.train.calibration_rows import halves, held_out_rows
from tests.models import random_batch


def numbered(*sizes: int) -> list[Batch]:
    """Batches whose rows are numbered through."""
    first, found = 0, list[Batch]()
    for size in sizes:
        batch = random_batch([[0] * 4] * size)
        found.append(replace(batch, tokens_BT=torch.arange(first, first + size)[:, None].expand(size, 4)))
        first += size
    return found


def rows(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.tokens_BT[:, 0].tolist()]


def test_every_second_row_of_each_set_is_judged() -> None:
    sets = {"a": numbered(3, 3, 2), "b": numbered(2)}
    split = halves(sets)
    assert {name: rows(list(batches)) for name, batches in split.calibration.items()} == {"a": [0, 2, 4, 6], "b": [0]}
    assert {name: rows(list(batches)) for name, batches in split.judged.items()} == {"a": [1, 3, 5, 7], "b": [1]}
    assert [len(batch.tokens_BT) for batch in split.judged["a"]] == [3, 1], "batches of the size of an evaluation"
    with pytest.raises(ConfigError, match="at least two held-out rows, and the set b"):
        halves({"a": numbered(2), "b": numbered(1)})


def test_a_task_makes_as_many_held_out_rows_as_are_asked_for() -> None:
    options = ["experiment=rule110", "data.rule110.validation_samples=8", "data.batch=6", "train.eval_batches=1"]
    config = compose(options)
    source = build_source(config.data)
    assert len(rows(held_out_rows(source, config)["rule110"])) == 6, "those of the run"
    [batches] = held_out_rows(source, config, 20).values()
    assert [len(batch.tokens_BT) for batch in batches] == [6, 6, 6, 2]
    expected = build_task(config.data).held_out(0, 20).tokens_BT
    assert torch.equal(torch.cat([batch.tokens_BT for batch in batches]), expected)
    with pytest.raises(ConfigError, match="--rows must be at least 2"):
        held_out_rows(source, config, 1)


def test_more_rows_than_text_has_are_refused() -> None:
    class Text:
        task, held_out = None, ("books",)

        def validation_batches(self, name: str, rows: int, count: int) -> list[Batch]:
            return numbered(rows, 2)[:count]

    config = compose(["experiment=rule110", "data.batch=4"])
    assert rows(held_out_rows(Text(), config, 5)["books"]) == [0, 1, 2, 3, 4]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the held-out set books has 6 rows: ask for at most as many with --rows"):
        held_out_rows(Text(), config, 7)  # type: ignore[arg-type]
