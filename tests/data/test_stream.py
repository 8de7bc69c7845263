"""The stream is tested on documents in which every token is different, so that it can be told from where it came."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.philox import random_order
from sleeptrain.data.stream import LaneStream
from sleeptrain.errors import DataError

LENGTHS = [2, 3, 40, 5, 131, 17, 2, 64, 9, 30, 2, 21]
TOTAL = sum(LENGTHS)


class NumberedShards:
    """Token = its place in the corpus: the documents hold 0, 1, 2, ... one after the other."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths_D = np.array(lengths, np.int64)
        self.num_documents, self.num_tokens = len(lengths), sum(lengths)
        self.starts_D = np.cumsum(self.lengths_D) - self.lengths_D

    def document(self, index: int) -> np.ndarray:
        return np.arange(self.lengths_D[index], dtype=np.uint16) + self.starts_D[index].astype(np.uint16)


SHARDS = NumberedShards(LENGTHS)
LAST_TOKENS = set((SHARDS.starts_D + SHARDS.lengths_D - 1).tolist())
OWNER = np.repeat(np.arange(len(LENGTHS)), LENGTHS)  # the document of a token


def make(sequence: int, seed: int = 0, lengths: list[int] | None = None) -> LaneStream:
    return LaneStream(NumberedShards(lengths or LENGTHS), sequence, seed)  # type: ignore[arg-type]


def epoch(stream: LaneStream, rows: int) -> list[Batch]:
    """All batches of the current epoch that are left."""
    number = stream.state_dict()["epoch"]
    batches = []
    while stream.state_dict()["epoch"] == number:
        batches.append(stream.batch(rows))
    return batches


def inputs(batches: list[Batch]) -> list[int]:
    return [token for batch in batches for token in batch.tokens_BT[batch.documents_BT != PAD].tolist()]


def _integers(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens_BT, batch.targets_BT, batch.documents_BT


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in Batch.__dataclass_fields__)


def changing(stream: LaneStream, seed: int, steps: int) -> Iterator[tuple[int, int, Batch]]:
    """Batches whose number of rows changes now and then, each with its epoch and that number."""
    rng = random.Random(seed)
    rows = 3
    for _ in range(steps):
        rows = rng.choice([1, 2, 3, 5, 8]) if rng.random() < 0.3 else rows
        yield stream.state_dict()["epoch"], rows, stream.batch(rows)


@pytest.mark.parametrize("sequence", [1, 7, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50])
def test_every_token_is_an_input_once_an_epoch(rows: int, sequence: int) -> None:
    stream = make(sequence)
    for number in range(2):
        batches = epoch(stream, rows)
        assert sorted(inputs(batches)) == list(range(TOTAL))
        assert len(batches) == math.ceil(math.ceil(TOTAL / rows) / sequence)
        assert stream.state_dict()["epoch"] == number + 1
    assert all(batch.tokens_BT.shape == (rows, sequence) for batch in batches)
    assert all(tensor.dtype == torch.int64 for batch in batches for tensor in _integers(batch))


def test_more_rows_than_tokens() -> None:
    batches = epoch(make(4, lengths=[2, 3]), 9)
    assert len(batches) == 1
    assert sorted(inputs(batches)) == list(range(5))
    assert not batches[0].carried_B.any() and not batches[0].continues_B.any()


@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_lost_or_repeated_when_rows_change(seed: int) -> None:
    stream = make(sequence=6)
    seen: dict[int, list[int]] = {}
    for number, _, batch in changing(stream, seed, 120):
        seen.setdefault(number, []).extend(inputs([batch]))
    num_complete = stream.state_dict()["epoch"]
    assert num_complete >= 3
    for number in range(num_complete):
        assert sorted(seen[number]) == list(range(TOTAL))


def test_targets_are_the_next_token_of_the_document() -> None:
    for _, _, batch in changing(make(sequence=6), 0, 100):
        for token, target, document in zip(
            batch.tokens_BT.flatten().tolist(),
            batch.targets_BT.flatten().tolist(),
            batch.documents_BT.flatten().tolist(),
            strict=True,
        ):
            assert target == (IGNORE if document == PAD or token in LAST_TOKENS else token + 1)


def test_lanes_are_contiguous_and_pads_come_last() -> None:
    order = np.concatenate([SHARDS.document(index) for index in random_order(len(LENGTHS), 0, 0)])
    batches = epoch(make(sequence=7), 4)
    lanes = []
    for row in range(4):
        valid = torch.cat([batch.documents_BT[row] != PAD for batch in batches])
        assert not valid[int(valid.sum()) :].any()
        lanes.append(torch.cat([batch.tokens_BT[row] for batch in batches])[valid])
    assert torch.cat(lanes).tolist() == order.tolist()
    assert {len(lane) for lane in lanes} <= {TOTAL // 4, TOTAL // 4 + 1}


def test_ids_tell_pieces_apart() -> None:
    """In a row, two neighbours share their id exactly when the second is the next token of the first's document."""
    gaps = 0
    for _, _, batch in changing(make(sequence=6), 1, 200):
        for tokens, documents in zip(batch.tokens_BT.tolist(), batch.documents_BT.tolist(), strict=True):
            pairs = [(i, i + 1) for i in range(len(tokens) - 1) if documents[i + 1] != PAD]
            for here, after in pairs:
                follows = tokens[after] == tokens[here] + 1 and tokens[here] not in LAST_TOKENS
                assert (documents[here] == documents[after]) == follows
                gaps += OWNER[tokens[here]] == OWNER[tokens[after]] and not follows
            ids = [documents[0]] + [documents[after] for here, after in pairs if documents[here] != documents[after]]
            assert len(set(ids)) == len(ids)
    assert gaps  # the case of one document with a gap in it has been met


def test_long_document_goes_on_in_its_row_with_one_id() -> None:
    batches = epoch(make(sequence=8), 1)
    longest = int(SHARDS.lengths_D.argmax())
    holding = [batch for batch in batches if (OWNER[batch.tokens_BT[0]] == longest).all()]
    assert len(holding) >= 14
    assert len({int(batch.documents_BT[0, 0]) for batch in holding}) == 1
    assert all(bool(batch.carried_B) for batch in holding)
    assert all(bool(batch.continues_B) for batch in holding[:-1])


def test_carried_exactly_where_a_row_goes_on() -> None:
    steps = list(changing(make(sequence=6), 2, 200))
    num_carried = 0
    for (number_before, rows_before, before), (number, rows, batch) in pairwise(steps):
        if number != number_before:
            assert not before.continues_B.any()
        if (number, rows) != (number_before, rows_before):
            assert not batch.carried_B.any()
            continue
        for row in range(rows):
            last, first = int(before.tokens_BT[row, -1]), int(batch.tokens_BT[row, 0])
            goes_on = batch.documents_BT[row, 0] != PAD and first == last + 1 and last not in LAST_TOKENS
            assert bool(batch.carried_B[row]) == bool(before.continues_B[row]) == goes_on
            if goes_on:
                assert batch.documents_BT[row, 0] == before.documents_BT[row, -1]
            num_carried += bool(goes_on)
    assert num_carried > 100


def test_first_step_of_a_cut_carries_nothing() -> None:
    stream = make(sequence=6)
    assert not stream.batch(2).carried_B.any()
    assert stream.batch(2).continues_B.any()
    assert not stream.batch(3).carried_B.any()
    rest = epoch(stream, 3)
    assert any(batch.carried_B.any() for batch in rest)
    assert not rest[-1].continues_B.any()
    assert not stream.batch(3).carried_B.any()


@pytest.mark.parametrize("seed", range(4))
def test_resume_equals_uninterrupted(seed: int) -> None:
    plan = [rows for _, rows, _ in changing(make(sequence=6), seed, 90)]
    whole = make(sequence=6)
    batches, states = [], []
    for rows in plan:
        states.append(json.dumps(whole.state_dict()))
        batches.append(whole.batch(rows))
    for point in range(0, len(plan), 7):
        resumed = make(sequence=6)
        resumed.batch(4)  # what it did before does not matter
        resumed.load_state_dict(json.loads(states[point]))
        assert json.dumps(resumed.state_dict()) == states[point]
        for rows, batch in zip(plan[point : point + 30], batches[point : point + 30], strict=True):
            assert equal(resumed.batch(rows), batch)


def test_state_does_not_grow_with_the_steps() -> None:
    stream = make(sequence=2)
    stream.batch(2)
    few = len(str(stream.state_dict()))
    for _ in range(50):
        stream.batch(2)
    assert len(str(stream.state_dict())) <= few + 2


def test_saved_state_is_not_changed_by_going_on() -> None:
    stream = make(sequence=2)
    stream.batch(2)
    state = stream.state_dict()
    before = json.dumps(state)
    stream.batch(2)
    assert json.dumps(state) == before


def test_order_depends_on_seed_and_epoch_only() -> None:
    first, again, other = make(16), make(16), make(16, seed=1)
    epochs = [inputs(epoch(first, 1)) for _ in range(2)]
    assert [inputs(epoch(again, 1)) for _ in range(2)] == epochs
    assert epochs[0] != epochs[1]
    assert inputs(epoch(other, 1)) not in epochs


def test_ids_of_two_epochs_differ() -> None:
    stream = make(16)
    ids = [{int(i) for batch in epoch(stream, 2) for i in batch.documents_BT.flatten()} - {PAD} for _ in range(2)]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (make(5), r"data\.sequence=6.*data\.sequence=5"),
        (make(6, seed=1), r"data\.seed=0.*data\.seed=1"),
        (make(6, lengths=[TOTAL]), "documents="),
        (make(6, lengths=[*LENGTHS[:-1], 1]), "tokens="),
    ],
)
def test_foreign_state_is_refused(other: LaneStream, name: str) -> None:
    with pytest.raises(DataError, match=name):
        other.load_state_dict(make(6).state_dict())


def test_order_is_the_same_for_ever() -> None:
    """A change here would send every resumed run to other data."""
    assert random_order(8, seed=0, stream=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert random_order(8, seed=1, stream=2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert sorted(random_order(100, seed=-1, stream=0).tolist()) == list(range(100))
