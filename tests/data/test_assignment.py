"""The pieces of the rows of a batch, and the start of a batch with another number of rows."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest

from sleeptrain.data import rows as rows_module
from sleeptrain.data.assignment import Assignment, Source, StreamSettings
from sleeptrain.errors import DataError
from tests.data.numbered import NumberedShards, mixture
from tests.data.test_rows import three_sources


def one_source(lengths: list[list[int]], **changes: object) -> Assignment:
    settings = StreamSettings(4, mixture(text=1.0), **changes)  # type: ignore[arg-type]
    return Assignment([Source(NumberedShards(lengths), "text", settings)], settings, 3)


def test_a_source_with_fewer_tokens_than_rows_is_refused() -> None:
    one_source([[1, 1], [1]])
    with pytest.raises(DataError, match=r"^data\.shards\.sources\.text has 2 tokens, fewer than the 3 rows of a batch"):
        one_source([[1], [1]])
    with pytest.raises(DataError, match=r"text has 2 rows of 4 tokens, fewer than the 3 rows"):
        one_source([[4], [4]], layout="one_document")


def test_a_new_number_of_rows_goes_on_where_the_old_rows_stop() -> None:
    before = one_source([[3, 5, 2], [4, 6]] * 8)
    after = before.following(2, 2)
    assert after.num_rows == 2 and before.owed(2) == after.owed(0) == [3 * 2 * 4]
    assert after.owed(1) == [3 * 2 * 4 + 2 * 4]


@pytest.mark.parametrize(
    "weights", [{"text": 0.7, "code": 0.3}, {"text": 0.999, "code": 0.001}, {"text": 1, "code": 0}]
)
def test_a_million_tokens_have_the_shares_of_the_weights(weights: dict[str, float]) -> None:
    parameters = StreamSettings(1000, mixture(**weights), shuffle_shards=3)
    shards = {name: made for name, made in three_sources().items() if name in weights}
    sources = [Source(made, name, parameters) for name, made in shards.items()]
    made = Assignment(sources, parameters, 4)
    with patch.object(rows_module, "STRETCH", 2**15):
        read = np.sum([made._row(row).read(250_000) for row in range(4)], axis=0)
    owed = [10**6 * share for share in parameters.stages[0].shares.values()]
    assert made.owed(250) == owed
    assert read.sum() == 10**6
    for amount, target in zip(read.tolist(), owed, strict=True):
        assert abs(amount - target) <= 4 * (120 + 40)
    if weights["code"] == 0:
        assert read[1] == 0 and not shards["code"].lengths_read and not shards["code"].fetched


def test_rows_do_not_change_to_a_source_at_one_time() -> None:
    """The clocks are out of phase, so that each batch holds the mixture, not one source after the other."""
    parameters = StreamSettings(100, mixture(text=0.5, code=0.5))
    shards = {"text": NumberedShards([[100] * 400]), "code": NumberedShards([[100] * 400], 1)}
    sources = [Source(made, name, parameters) for name, made in shards.items()]
    made = Assignment(sources, parameters, 40)
    with patch.object(rows_module, "STRETCH", 2**10):
        for step in range(3):
            code = sum(int(piece["source"]) for row in range(40) for piece in made.pieces(step, row)[:1])
            assert 5 <= code <= 35
    other = replace(parameters, seed=1)
    words = [Assignment(sources, setting, 40)._lead(sources[0], 7) for setting in (parameters, other)]
    assert words[0] != words[1]


def test_documents_are_read_when_they_are_due() -> None:
    """Two sources of documents of 2 and 6 tokens, equal weights, no lead: due at times 0, 4, 8, .. and 0, 12, 24, .."""
    parameters = StreamSettings(8, mixture(a=0.5, b=0.5))
    shards = {"a": NumberedShards([[2] * 60]), "b": NumberedShards([[6] * 20], 1)}
    sources = [Source(made, name, parameters) for name, made in shards.items()]
    with (
        patch.object(Assignment, "_lead", lambda self, source, row: 0),
        patch.object(rows_module, "STRETCH", 64),
    ):
        pieces = Assignment(sources, parameters, 1).pieces(0, 0)
        more = Assignment(sources, parameters, 1)._row(0).pieces(0, 48)
    assert pieces["source"].tolist() == [0, 1]
    assert more["source"].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0][: len(more)]
    assert more["begin"].tolist()[:6] == [0, 2, 8, 10, 12, 14]
