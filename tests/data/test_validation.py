from __future__ import annotations

import numpy as np
import torch

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.validation import validation_batches
from tests.data.numbered import SOURCES, NumberedShards, assert_equal

LENGTHS = [[2, 3, 40, 5], [131, 17], [2, 64, 9, 30, 2], [20, 19, 21]]
SEQUENCE = 20  # one document has as many tokens, one has one less
FLAT = [length for shard in LENGTHS for length in shard]
STARTS = (np.cumsum(FLAT) - FLAT).tolist()
OWNER = np.repeat(np.arange(len(FLAT)), FLAT).tolist()  # the number of a token's document, over all shards
LONG = {document for document, length in enumerate(FLAT) if length >= SEQUENCE}


def batches(rows: int, count: int | None = None) -> list[Batch]:
    return list(validation_batches(NumberedShards(LENGTHS), SEQUENCE, rows, count))  # type: ignore[arg-type]


def rows_of(made: list[Batch]) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens (as numbers from 0 on), targets and documents of each row."""
    rows = []
    for batch in made:
        for tokens, targets, documents in zip(batch.tokens_BT, batch.targets_BT, batch.documents_BT, strict=True):
            numbers = torch.where(targets == IGNORE, targets, targets // SOURCES)
            rows.append(((tokens // SOURCES).tolist(), numbers.tolist(), documents.tolist()))
    return rows


def test_long_documents_come_first_from_their_beginning() -> None:
    first = rows_of(batches(2))[: len(LONG)]
    assert {OWNER[tokens[0]] for tokens, _, _ in first} == LONG
    for tokens, _, documents in first:
        start = STARTS[OWNER[tokens[0]]]
        assert tokens == list(range(start, start + SEQUENCE))
        assert len(set(documents)) == 1


def test_the_order_is_the_same_for_ever() -> None:
    """After a change, the evaluations of a resumed run could not be compared with the earlier ones."""
    assert [OWNER[tokens[0]] for tokens, _, _ in rows_of(batches(1))[:6]] == [2, 11, 9, 13, 4, 7]


def test_short_documents_are_packed() -> None:
    rest = rows_of(batches(1))[len(LONG) :]
    packed = [document for _, _, documents in rest for document in dict.fromkeys(documents) if document != PAD]
    assert sorted(packed) == sorted(set(range(len(FLAT))) - LONG)
    for number, (tokens, _, documents) in enumerate(rest):
        assert PAD not in documents or number == len(rest) - 1
        for document in set(documents) - {PAD}:
            begin, length = documents.index(document), documents.count(document)
            assert length == FLAT[document] or begin + length == SEQUENCE  # the last document of a row is cut off
            assert tokens[begin : begin + length] == list(range(STARTS[document], STARTS[document] + length))


def test_targets_and_flags() -> None:
    for batch in batches(3):
        assert not batch.carried_B.any() and not batch.continues_B.any()
    for tokens, targets, documents in rows_of(batches(3)):
        for token, target, document in zip(tokens, targets, documents, strict=True):
            last = document == PAD or token == STARTS[document] + FLAT[document] - 1
            assert target == (IGNORE if last else token + 1)


def test_the_size_and_number_of_batches_do_not_change_the_rows() -> None:
    expected = torch.cat([batch.tokens_BT for batch in batches(1)])
    for rows in (2, 3, 100):
        assert torch.equal(torch.cat([batch.tokens_BT for batch in batches(rows)]), expected)
    assert torch.equal(torch.cat([batch.tokens_BT for batch in batches(2, count=2)]), expected[:4])
    assert [len(batch.tokens_BT) for batch in batches(4)][:-1] == [4] * (len(expected) // 4)
    assert batches(2, count=0) == []
    for batch, again in zip(batches(2), batches(2), strict=True):
        assert_equal(batch, again)
