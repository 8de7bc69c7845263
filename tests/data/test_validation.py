from __future__ import annotations

import torch

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.validation import validation_batches
from tests.data.test_stream import LENGTHS, OWNER, SHARDS

SEQUENCE = 20
LONG = {index for index, length in enumerate(LENGTHS) if length >= SEQUENCE}


def batches(rows: int, count: int | None = None) -> list[Batch]:
    return list(validation_batches(SHARDS, SEQUENCE, rows, count))  # type: ignore[arg-type]


def test_long_documents_come_first_from_their_beginning() -> None:
    rows = [row for batch in batches(2) for row in batch.tokens_BT]
    for row in rows[: len(LONG)]:
        start = int(row[0])
        assert start in SHARDS.starts_D
        assert row.tolist() == list(range(start, start + SEQUENCE))
    assert {int(OWNER[int(row[0])]) for row in rows[: len(LONG)]} == LONG


def test_short_documents_are_packed() -> None:
    rest = [
        (tokens, documents)
        for batch in batches(1)[len(LONG) :]
        for tokens, documents in zip(batch.tokens_BT, batch.documents_BT, strict=True)
    ]
    used = torch.cat([documents[documents != PAD].unique() for _, documents in rest]).tolist()
    assert sorted(used) == sorted(set(range(len(LENGTHS))) - LONG)
    for number, (tokens, documents) in enumerate(rest):
        assert (documents != PAD).all() or number == len(rest) - 1
        for document in documents[documents != PAD].unique().tolist():
            held = tokens[documents == document].tolist()
            assert held == list(range(SHARDS.starts_D[document], SHARDS.starts_D[document] + len(held)))


def test_targets_and_flags() -> None:
    for batch in batches(3):
        assert not batch.carried_B.any() and not batch.continues_B.any()
        for tokens, targets, documents in zip(batch.tokens_BT, batch.targets_BT, batch.documents_BT, strict=True):
            for token, target, document in zip(tokens.tolist(), targets.tolist(), documents.tolist(), strict=True):
                last = document == PAD or token == SHARDS.starts_D[document] + LENGTHS[document] - 1
                assert target == (IGNORE if last else token + 1)


def test_rows_and_count_do_not_change_the_rows() -> None:
    whole = torch.cat([batch.tokens_BT for batch in batches(1)])
    for rows in (2, 3, 100):
        assert torch.equal(torch.cat([batch.tokens_BT for batch in batches(rows)]), whole)
    assert torch.equal(torch.cat([batch.tokens_BT for batch in batches(2, count=2)]), whole[:4])
    assert [len(batch.tokens_BT) for batch in batches(4)][:-1] == [4] * (len(whole) // 4)
    assert batches(2, count=0) == []
