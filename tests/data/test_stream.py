"""The stream on documents in which every token is different, compared with a second implementation of the order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeptrain.data import rows as rows_module
from sleeptrain.data.assignment import StreamSettings
from sleeptrain.data.batch import IGNORE, PAD, Batch, Part
from sleeptrain.data.shards import DamagedDocument
from sleeptrain.data.stream import ShardStream
from sleeptrain.errors import DataError
from tests.data.numbered import (
    SOURCES,
    Case,
    NumberedShards,
    assert_equal,
    cases,
    joined,
    mixture,
    short_stretches,
    tokens,
)
from tests.data.oracle import Oracle

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
MANY = settings(max_examples=1500, deadline=None, derandomize=True, database=None)
LENGTHS = [[2, 3, 40], [5, 131], [17, 2, 64, 9], [30], [2, 21]]
CODE = [[7, 1, 12], [33, 4, 4, 4], [50]]
TOTAL = sum(map(sum, LENGTHS))


@pytest.fixture(autouse=True)
def _short_stretches() -> Iterator[None]:
    with short_stretches():
        yield


def make(layout: str = "lanes", sequence: int = 6, seed: int = 0, shuffle: int = 2, **options: object) -> ShardStream:
    """One source."""
    parameters = StreamSettings(sequence, mixture(text=1), layout, seed, shuffle)
    return ShardStream({"text": NumberedShards(LENGTHS)}, parameters, **options)  # type: ignore


def make_mixture(sequence: int = 6, **options: object) -> ShardStream:
    parameters = StreamSettings(sequence, mixture(text=0.7, code=0.3), "lanes", 0, 2)
    return ShardStream({"text": NumberedShards(LENGTHS), "code": NumberedShards(CODE, 1)}, parameters, **options)  # type: ignore


def read(stream: ShardStream, plan: Sequence[int]) -> list[Batch]:
    return [stream.batch(rows) for rows in plan]


def steps_of(epochs: int, rows: int, sequence: int = 6) -> int:
    return -(-epochs * TOTAL // (rows * sequence))


# Batches


def check_against_the_oracle(case: Case) -> None:
    expected = Oracle(case.shards(), case.settings).batches(case.plan)
    with case.planned():
        for batch, oracle in zip(read(case.stream(), case.plan), expected, strict=True):
            assert_equal(batch, oracle)


@FEW
@given(cases())
def test_equals_the_second_implementation(case: Case) -> None:
    check_against_the_oracle(case)


@pytest.mark.slow
@MANY
@given(cases())
def test_equals_the_second_implementation_in_many_cases(case: Case) -> None:
    check_against_the_oracle(case)


@FEW
@given(cases())
def test_every_epoch_is_read_once(case: Case) -> None:
    """No token is read twice in an epoch, and all tokens are read of an epoch that every row has finished."""
    shards = case.shards()
    with case.planned():
        stream = case.stream()
        batches = read(stream, case.plan)
    sizes = [source.line.epoch_size for source in stream._sources]
    read_in: dict[tuple[int, int], Counter[int]] = {}
    latest = np.full((case.plan[-1], len(shards)), -1)  # the last epoch that a row has read of a source since the cut
    last_cut = len(case.plan) - next(i for i, r in enumerate([*case.plan[::-1], 0]) if r != case.plan[-1])
    for step, batch in enumerate(batches):
        for row in range(case.plan[step]):
            for token, identity in zip(batch.tokens_BT[row].tolist(), batch.documents_BT[row].tolist(), strict=True):
                if identity == PAD:
                    continue
                k = identity % len(shards)
                assert token % SOURCES == k
                epoch = identity // len(shards) // sizes[k]
                read_in.setdefault((k, epoch), Counter())[token // SOURCES] += 1
                if step >= last_cut:
                    latest[row, k] = epoch
    assert all(count == 1 for counter in read_in.values() for count in counter.values())
    for k, source in enumerate(shards.values()):
        for epoch in range(latest[:, k].min()):
            assert len(read_in[k, epoch]) == source.num_tokens


@FEW
@given(cases())
def test_rows_go_on_with_their_documents(case: Case) -> None:
    """Ids, targets and flags agree with the batches themselves, without the oracle."""
    shards = case.shards()
    documents = [
        source.document(shard, index).tolist()
        for source in shards.values()
        for shard in range(source.num_shards)
        for index in range(len(source.lengths(shard)))
    ]
    follower = {a: b for document in documents for a, b in zip(document, [*document[1:], IGNORE], strict=True)}
    with case.planned():
        batches = read(case.stream(), case.plan)
    for batch in batches:
        for row in range(len(batch.tokens_BT)):
            check_documents(batch.rows(row, row + 1), follower)
            if case.settings.layout == "one_document":
                real = batch.documents_BT[row] != PAD
                assert real[: int(real.sum())].all() and len(batch.documents_BT[row][real].unique()) == 1
    for before, batch in zip([None, *batches], batches, strict=False):
        goes_on = torch.zeros_like(batch.carried_B)
        if before is not None and len(before.tokens_BT) == len(batch.tokens_BT):
            goes_on = (batch.documents_BT[:, 0] == before.documents_BT[:, -1]) & (batch.documents_BT[:, 0] != PAD)
            for row in goes_on.nonzero().flatten().tolist():
                assert int(batch.tokens_BT[row, 0]) == follower[int(before.tokens_BT[row, -1])]
            goes_on &= case.settings.layout != "packed"
            assert torch.equal(before.continues_B, goes_on)
        assert torch.equal(batch.carried_B, goes_on)


def check_documents(row: Batch, follower: dict[int, int]) -> None:
    """Checks the targets, and that each document has one id and stands in one place."""
    text, ids = row.tokens_BT[0].tolist(), row.documents_BT[0].tolist()
    targets = [IGNORE if i == PAD else follower[t] for t, i in zip(text, ids, strict=True)]
    assert row.targets_BT[0].tolist() == targets
    runs = [identity for identity, _ in groupby(ids) if identity != PAD]
    assert len(runs) == len(set(runs))
    for at in range(1, len(ids)):
        assert ids[at] != ids[at - 1] or ids[at] == PAD or text[at] == follower[text[at - 1]]


def test_long_document_goes_on_in_its_row_with_one_id() -> None:
    batches = read(make(sequence=8), [1] * 60)
    longest = set(NumberedShards(LENGTHS).document(1, 1).tolist())
    holding = [batch for batch in batches[:41] if set(tokens(batch)) <= longest]
    assert len(holding) >= 14
    assert len({int(batch.documents_BT[0, 0]) for batch in holding}) == 1
    assert all(bool(batch.carried_B) for batch in holding[1:])
    assert all(bool(batch.continues_B) for batch in holding[:-1])


def test_first_step_of_a_cut_carries_nothing() -> None:
    stream = make()
    assert not stream.batch(2).carried_B.any()
    assert stream.batch(2).continues_B.any()
    assert not stream.batch(3).carried_B.any()
    assert any(stream.batch(3).carried_B.any() for _ in range(5))


def test_changing_numbers_of_rows_lose_nothing() -> None:
    stream = make()
    plan = [1, 5, 2, 5, 1, 3] * 30
    seen = Counter(token for batch in read(stream, plan) for token in tokens(batch))
    assert sum(seen.values()) == 6 * sum(plan)
    rounds, rest = divmod(6 * sum(plan), TOTAL)
    assert max(seen.values()) - min(seen.values()) <= 2
    assert rounds == stream.epochs()["text"] // 1 and rest
    assert len(seen) == TOTAL


@pytest.mark.parametrize("plan", [[4] * 3000, [1] * 500 + [6] * 800 + [3] * 400], ids=["one cut", "three cuts"])
def test_epochs_count_the_tokens_that_were_read(plan: list[int]) -> None:
    """The error is at most a document and a lead for each row, source and cut."""
    stream = make_mixture()
    read_of = Counter(token % SOURCES for batch in read(stream, plan) for token in tokens(batch))
    assert sum(read_of.values()) == 6 * sum(plan)
    cuts = {rows: plan.count(rows) for rows in plan}
    for k, (name, size, longest, share) in enumerate([("text", TOTAL, 131, 0.7), ("code", 115, 50, 0.3)]):
        owed = stream.epochs()[name] * size
        assert owed == pytest.approx(share * 6 * sum(plan), abs=len(cuts) * 6)
        assert abs(read_of[k] - owed) <= sum(cuts) * (longest + 131 + 50)
    assert make().epochs() == {"text": 0}


# Ranks, workers, resuming


@pytest.mark.parametrize("build", [make, make_mixture])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1), (4, 3), (9, 1)])
def test_ranks_and_workers_change_nothing(build: Callable[..., ShardStream], ranks: int, workers: int) -> None:
    """The plan is longer than two epochs. Nine ranks are more than the shards, and more than the rows."""
    plan = [8] * steps_of(2, 8) + [3] * 20
    expected = read(build(), plan)
    parts = [build(part=Part(rank, ranks), workers=workers) for rank in range(ranks)]
    for rows, batch in zip(plan, expected, strict=True):
        assert_equal(joined([part.batch(rows) for part in parts]), batch)
    assert all(part.state_dict() == parts[0].state_dict() for part in parts)
    assert min(parts[0].epochs().values()) >= 1


def check_kill_and_resume(case: Case, data: st.DataObject) -> None:
    killed = data.draw(st.integers(0, len(case.plan)), "killed before step")
    ranks_before, ranks_after = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 8)), "ranks")
    workers = data.draw(st.sampled_from([0, 0, 0, 2]), "workers")
    with case.planned():
        expected = read(case.stream(), case.plan)
        before = [case.stream(part=Part(rank, ranks_before), workers=workers) for rank in range(ranks_before)]
        batches = [joined([part.batch(rows) for part in before]) for rows in case.plan[:killed]]
        states = {json.dumps(part.state_dict()) for part in before}
        assert len(states) == 1
        after = [case.stream(part=Part(rank, ranks_after), workers=workers) for rank in range(ranks_after)]
        for part in after:
            part.load_state_dict(json.loads(next(iter(states))))
        batches += [joined([part.batch(rows) for part in after]) for rows in case.plan[killed:]]
    for batch, one in zip(batches, expected, strict=True):
        assert_equal(batch, one)


@FEW
@given(cases(), st.data())
def test_killed_and_resumed_on_other_ranks(case: Case, data: st.DataObject) -> None:
    check_kill_and_resume(case, data)


@pytest.mark.slow
@MANY
@given(cases(), st.data())
def test_killed_and_resumed_on_other_ranks_in_many_cases(case: Case, data: st.DataObject) -> None:
    check_kill_and_resume(case, data)


def test_a_stream_that_has_read_other_rows_resumes() -> None:
    stream = make_mixture(workers=2)
    read(stream, [4] * 9 + [2] * 5)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = read(stream, [2] * 10)
    other = make_mixture(workers=2)
    read(other, [3] * 4)
    other.load_state_dict(state)
    for batch, again in zip(read(other, [2] * 10), expected, strict=True):
        assert_equal(batch, again)
    assert other.state_dict()["cuts"] == [[4, 9], [2, 15]]


def huge(shards: int = 60, documents: int = 50, seed: int = 0) -> dict[str, NumberedShards]:
    """Two sources of some hundred thousand tokens."""
    rng = np.random.default_rng(seed)
    return {
        name: NumberedShards(rng.integers(1, 120, (shards, documents)).tolist(), k)
        for k, name in enumerate(["text", "code"])
    }


HUGE = StreamSettings(128, mixture(text=0.7, code=0.3), shuffle_shards=4)


@pytest.mark.parametrize("cuts", [[[8, 10**7]], [[8, 10**7], [4, 5], [8, 3 * 10**6]]])
def test_resuming_costs_no_more_after_many_steps(cuts: list[list[int]]) -> None:
    """For each cut a row looks only at the groups around the two ends of a stretch, however far they are."""
    sources = huge()
    stream = ShardStream(sources, HUGE)  # type: ignore[arg-type]
    few = json.dumps(stream.state_dict() | {"cuts": [[8, 10]]})
    stream.load_state_dict(json.loads(few) | {"cuts": cuts})
    for source in sources.values():
        assert len(source.lengths_read) <= 8 * len(cuts) * 6 * HUGE.shuffle_shards
    assert len(json.dumps(stream.state_dict())) <= len(few) + 20 * len(cuts)
    assignment, step = stream.next_step(8)
    assert step == cuts[-1][1]
    fresh = ShardStream(huge(), HUGE)  # type: ignore[arg-type]
    fresh.load_state_dict(json.loads(few) | {"cuts": [*cuts[:-1], [8, step - 3]]})
    walked = read(fresh, [8] * 4)[-1]
    again = ShardStream(huge(), HUGE)  # type: ignore[arg-type]
    again.load_state_dict(json.loads(few) | {"cuts": cuts})
    direct = again.batch(8)
    assert_equal(direct, walked)
    for row in range(8):
        pieces = assignment.pieces(step, row)
        ids = (pieces["line"] * 2 + pieces["source"]).tolist()
        assert list(dict.fromkeys(direct.documents_BT[row].tolist())) == ids


def test_state_does_not_grow_with_the_steps() -> None:
    stream = make()
    stream.batch(2)
    few = len(str(stream.state_dict()))
    read(stream, [2] * 98)
    assert len(str(stream.state_dict())) == few + 1
    assert stream.state_dict()["cuts"] == [[2, 99]]


def test_saved_state_is_not_changed_by_going_on() -> None:
    stream = make()
    stream.batch(2)
    state = stream.state_dict()
    before = json.dumps(state)
    stream.batch(2)
    assert json.dumps(state) == before


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (make(sequence=5), r"data\.sequence=6.*data\.sequence=5"),
        (make(seed=1), r"data\.seed=0.*data\.seed=1"),
        (make("packed"), r"data\.layout=lanes.*data\.layout=packed"),
        (make(shuffle=3), r"data\.shards\.shuffle=2.*data\.shards\.shuffle=3"),
        (make_mixture(), r"data\.shards\.sources="),
        (
            ShardStream({"text": NumberedShards([*LENGTHS, [1]])}, make().settings),  # type: ignore
            r"data\.shards\.sources=",
        ),
        (
            ShardStream(
                {"text": NumberedShards(LENGTHS)},  # type: ignore
                replace(make().settings, stages=[*mixture(text=1), replace(mixture(text=1)[0], tokens=100)]),
            ),
            r"data\.shards\.weights=",
        ),
    ],
    ids=["sequence", "seed", "layout", "shuffle", "sources", "data", "weights"],
)
def test_foreign_state_is_refused(other: ShardStream, name: str) -> None:
    with pytest.raises(DataError, match=name):
        other.load_state_dict(make().state_dict())
    other.load_state_dict(other.state_dict())


def test_sources_in_another_order_are_refused() -> None:
    """Where two documents are due at one time, the first source's document is read first."""
    sources = {"code": NumberedShards(CODE, 1), "text": NumberedShards(LENGTHS)}
    other = ShardStream(sources, make_mixture().settings)  # type: ignore
    with pytest.raises(DataError, match=r"data\.shards\.sources="):
        other.load_state_dict(make_mixture().state_dict())


def test_order_depends_on_seed_and_epoch_only() -> None:
    def epochs(stream: ShardStream) -> list[list[int]]:
        order = [token for batch in read(stream, [1] * steps_of(2, 1)) for token in tokens(batch)]
        return [order[:TOTAL], order[TOTAL : 2 * TOTAL]]

    first, second = epochs(make())
    assert epochs(make(sequence=16)) == [first, second]
    assert first != second and sorted(first) == sorted(second)
    assert first not in epochs(make(seed=1))


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.shards\.sources\.text has 326 tokens, fewer than the 327 rows"):
        make().batch(TOTAL + 1)
    with patch.object(rows_module, "STRETCH", 8):
        assert len(make().batch(TOTAL).tokens_BT) == TOTAL
    with pytest.raises(DataError, match=r"text has 59 rows of 6 tokens, fewer than the 60 rows"):
        make("one_document").batch(60)


# Damage

DAMAGED = [(0, 2), (3, 0)]


def damaged(**options: object) -> ShardStream:
    shards = {"text": NumberedShards(LENGTHS, damaged=DAMAGED)}
    return ShardStream(shards, make().settings, **options)  # type: ignore


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_documents_become_pads(workers: int) -> None:
    plan = [3] * steps_of(2, 3)
    stream, lost = damaged(workers=workers, skip_damaged=True), set()
    for shard, index in DAMAGED:
        lost |= set(NumberedShards(LENGTHS).document(shard, index).tolist())
    pads = 0
    for batch, intact in zip(read(stream, plan), read(make(), plan), strict=True):
        bad = np.isin(intact.tokens_BT.numpy(), list(lost))
        pads += int(bad.sum())
        assert (batch.documents_BT.numpy()[bad] == PAD).all() and (batch.targets_BT.numpy()[bad] == IGNORE).all()
        for name in ("tokens_BT", "targets_BT", "documents_BT"):
            assert (getattr(batch, name).numpy()[~bad] == getattr(intact, name).numpy()[~bad]).all(), name
        assert batch.carried_B.tolist() == (intact.carried_B.numpy() & ~bad[:, 0]).tolist()
        assert batch.continues_B.tolist() == (intact.continues_B.numpy() & ~bad[:, -1]).tolist()
    assert pads >= 2 * len(lost)
    assert stream.assembler.damaged == {(0, *which) for which in DAMAGED}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_document_stops_the_run(workers: int) -> None:
    lost = {*NumberedShards(LENGTHS).document(4, 1).tolist()}
    intact = read(make(), [3] * steps_of(2, 3))
    first = next(step for step, batch in enumerate(intact) if lost & {*tokens(batch)})
    assert first > 0
    shards = {"text": NumberedShards(LENGTHS, damaged=[(4, 1)])}
    stream = ShardStream(shards, make().settings, workers=workers)  # type: ignore
    for batch in intact[:first]:
        assert_equal(stream.batch(3), batch)
    with pytest.raises(DamagedDocument, match="shard 4, document 1"):
        stream.batch(3)
