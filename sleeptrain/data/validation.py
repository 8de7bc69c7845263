"""Validation batches: rows begin with the first token of a document, so that late windows have as much context as
possible."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.philox import random_order
from sleeptrain.data.shards import TokenShards


def validation_batches(shards: TokenShards, sequence: int, rows: int, count: int | None) -> Iterator[Batch]:
    """At most `count` batches of `rows` rows; the same at each call and for every seed of the run.

    First come the documents of at least `sequence` tokens, one in each row, cut at T. Then the shorter documents come,
    several packed into each row, the last of them cut. Only the last row is padded. No document is used twice. The last
    batch may have fewer rows. No state is carried between rows or batches.
    """
    lengths = [shards.lengths(shard) for shard in range(shards.num_shards)]
    firsts = np.cumsum([0, *map(len, lengths)])  # the number, over all shards, of each shard's first document
    plan = _rows(np.concatenate(lengths), sequence)
    batches = iter(lambda: list(islice(plan, rows)), [])
    for numbers in islice(batches, count):
        yield _assemble(shards, firsts, numbers, sequence)


def _rows(lengths_D: np.ndarray, sequence: int) -> Iterator[list[int]]:
    """The documents of each row, in a fixed random order."""
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


def _assemble(shards: TokenShards, firsts: np.ndarray, rows: list[list[int]], sequence: int) -> Batch:
    tokens_BT = np.full((len(rows), sequence), PAD_TOKEN, np.int64)
    targets_BT = np.full_like(tokens_BT, IGNORE)
    documents_BT = np.full_like(tokens_BT, PAD)
    for row, numbers in enumerate(rows):
        begin = 0
        for number in numbers:
            shard = int(np.searchsorted(firsts, number, side="right")) - 1
            document = shards.document(shard, number - int(firsts[shard]))
            part = slice(begin, min(begin + len(document), sequence))
            tokens_BT[row, part] = document[: part.stop - begin]
            targets = document[1 : part.stop - begin + 1]
            targets_BT[row, begin : begin + len(targets)] = targets
            documents_BT[row, part] = number
            begin = part.stop
    apart_B = np.zeros(len(rows), bool)
    return Batch(*map(torch.from_numpy, (tokens_BT, targets_BT, documents_BT, apart_B, apart_B)))
