"""Validation batches: rows that begin where a document begins, so that late windows have all the context they can."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.philox import random_order
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.stream import PAD_TOKEN, inputs_and_targets


def validation_batches(shards: TokenShards, sequence: int, rows: int, count: int | None) -> Iterator[Batch]:
    """At most `count` batches of `rows` rows; the same at each call, whatever the run's seed.

    First come the documents of `sequence` tokens and more, one a row, cut off at T; then the shorter ones, packed
    several to a row, of which the last is cut off; the very last row is padded. No document is used twice. The last
    batch has fewer rows where the documents run out. No row carries anything in or leaves anything behind.
    """
    plan = _rows(shards.lengths_D, sequence)
    batches = iter(lambda: list(islice(plan, rows)), [])
    for documents in islice(batches, count):
        yield _assemble(shards, documents, sequence)


def _rows(lengths_D: np.ndarray, sequence: int) -> Iterator[list[int]]:
    """The documents of each row, in a fixed order that has nothing to do with their names."""
    order = random_order(len(lengths_D), seed=0, stream=0).tolist()
    for document in order:
        if lengths_D[document] >= sequence:
            yield [document]
    row: list[int] = []
    for document in order:
        if lengths_D[document] < sequence:
            row.append(document)
            if lengths_D[row].sum() >= sequence:
                yield row
                row = []
    if row:
        yield row


def _assemble(shards: TokenShards, rows: list[list[int]], sequence: int) -> Batch:
    tokens_BT = np.full((len(rows), sequence), PAD_TOKEN, np.int64)
    targets_BT = np.full_like(tokens_BT, IGNORE)
    documents_BT = np.full_like(tokens_BT, PAD)
    for row, documents in enumerate(rows):
        begin = 0
        for document in documents:
            length = min(int(shards.lengths_D[document]), sequence - begin)
            part = slice(begin, begin + length)
            tokens_BT[row, part], targets_BT[row, part] = inputs_and_targets(shards.document(document), 0, length)
            documents_BT[row, part] = document
            begin += length
    apart_B = torch.zeros(len(rows), dtype=torch.bool)
    return Batch(
        torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT), torch.from_numpy(documents_BT), apart_B, apart_B
    )
