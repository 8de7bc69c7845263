from __future__ import annotations

from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeptrain.data import rows as rows_module
from sleeptrain.data.assignment import Assignment, MixtureShares, Source, StreamSettings
from sleeptrain.data.mixture import shares
from tests.data.numbered import Case, NumberedShards, cases

FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def assignment(case: Case) -> Assignment:
    sources = [Source(shards, name, case.settings) for name, shards in case.shards().items()]
    return Assignment(sources, case.settings, case.plan[0])


@FEW
@given(cases(max_cuts=1), st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), min_size=1, max_size=6))
def test_any_part_of_a_row_equals_that_part_of_the_whole(case: Case, requests: list[tuple[int, int]]) -> None:
    """This holds in any order of requests and for any length of a stretch."""
    with case.planned():
        row = assignment(case)._row(0)
        found = [row.pieces(begin, begin + length) for begin, length in requests]
        read = [row.read(begin) for begin, _ in requests]
    with patch.object(rows_module, "STRETCH", 700):
        complete = assignment(case)._row(0).pieces(0, 600)
    ends = complete["begin"] + complete["size"]
    assert complete["begin"][0] == 0 and (complete["begin"][1:] == ends[:-1]).all() and (complete["size"] > 0).all()
    for (begin, length), pieces, counts in zip(requests, found, read, strict=True):
        assert (pieces == complete[(ends > begin) & (complete["begin"] < begin + length)]).all()
        assert len(pieces) and pieces["begin"][0] <= begin < pieces["begin"][0] + pieces["size"][0]
        before = complete[complete["begin"] < begin]
        sizes = np.minimum(before["size"], begin - before["begin"])
        assert counts == [int(sizes[before["source"] == k].sum()) for k in range(len(case.sources))]


LONGEST = {"text": 120, "code": 40, "maths": 300}


def three_sources() -> dict[str, NumberedShards]:
    rng = np.random.default_rng(0)
    return {
        name: NumberedShards(rng.integers(1, longest + 1, (20, 40)).tolist(), k)
        for k, (name, longest) in enumerate(LONGEST.items())
    }


def refuse_stray(
    position: int,
    owed: dict[str, Fraction],
    read: dict[str, int],
    lead_of: dict[str, int],
    highest: dict[str, Fraction],
) -> None:
    """Fails where a row has read more or less of a source than its weight allows at a row position.

    At clock time t, R_k lies in [Q_k - lead_k, Q_k + longest_k): a document that is due is read whole. The row position
    is the sum of all R_k. It is ahead of the clock by less than the sum of the longest documents. It is behind by at
    most the leads and a token for each source and stage, of which a source is owed at most its highest share.
    """
    ahead_of_clock, behind_clock = sum(LONGEST.values()), sum(lead_of.values()) + 2 * len(LONGEST)
    for name, amount in owed.items():
        excess = read[name] - amount
        most = LONGEST[name] + behind_clock * highest[name]
        assert -lead_of[name] - 2 - ahead_of_clock * highest[name] <= excess <= most, (position, name, excess)


@pytest.mark.parametrize("rows", [1, 3])
def test_shares_are_kept_exactly(rows: int) -> None:
    """At 60,000 tokens the weights change: one source begins and one ends. All rows are checked every few documents."""
    first, second = shares({"text": 0.7, "code": 0.3, "maths": 0}), shares({"text": 0.05, "code": 0, "maths": 0.95})
    stages = [MixtureShares(0, first), MixtureShares(60_000, second)]
    highest = {name: max(first[name], second[name]) for name in LONGEST}
    parameters = StreamSettings(64, stages, shuffle_shards=3)
    sources = [Source(shards, name, parameters) for name, shards in three_sources().items()]
    made = Assignment(sources, parameters, rows)
    with patch.object(rows_module, "STRETCH", 2**13):
        for number in range(rows):
            row = made._row(number)
            lead_of = {source.name: made._lead(source, number) for source in sources}
            assert all(lead_of[source.name] < source.mean_size for source in sources) and any(lead_of.values())
            change = 60_000 // rows
            for position in [*range(0, 2 * change, 331), 10**6]:
                owed = {
                    name: first[name] * min(position, change) + second[name] * max(0, position - change)
                    for name in LONGEST
                }
                read = dict(zip(LONGEST, row.read(position), strict=True))
                assert sum(read.values()) == position
                refuse_stray(position, owed, read, lead_of, highest)
