"""Lane packing: an endless stream of batches in which a long document goes on in the same row at the next step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.lanes import Cut
from sleeptrain.data.philox import random_order
from sleeptrain.data.position import check_position
from sleeptrain.data.shards import TokenShards

PAD_TOKEN = 0  # what stands in `tokens_BT` at a pad; any id will do, nothing reads it


def inputs_and_targets(document: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [begin, end) of a document and, for each, the one that follows; both int64 [end - begin].

    The target of the last token is IGNORE: what comes after a document was written by somebody else.
    """
    tokens = document[begin : end + 1].astype(np.int64)
    return tokens[: end - begin], np.append(tokens[1:], IGNORE)[: end - begin]


class Epoch:
    """All documents of `shards`, put one after the other in the order of epoch `number`: positions [0, E).

    starts: int64 [D + 1], the position at which the d-th document of the order begins; the last one is E.
    """

    def __init__(self, shards: TokenShards, seed: int, number: int) -> None:
        self._shards = shards
        self._order = random_order(shards.num_documents, seed, number)
        self.starts = np.concatenate([[0], np.cumsum(shards.lengths_D[self._order])])

    def document_starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the documents begin in which `positions` lie (any shape)."""
        return self.starts[np.searchsorted(self.starts, positions, side="right") - 1]

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets at the positions [begin, end), which lie in one document."""
        rank = int(np.searchsorted(self.starts, begin, side="right")) - 1
        document = self._shards.document(int(self._order[rank]))
        return inputs_and_targets(document, begin - int(self.starts[rank]), end - int(self.starts[rank]))


class LaneStream:
    """Epoch after epoch of `shards`, `sequence` tokens a row and step; every token is an input once in an epoch.

    An epoch's documents, in an order that depends on (seed, epoch) only, are one long stream, cut into as many
    contiguous lanes as a batch has rows. Where the number of rows changes, what is unread is cut anew. A lane that
    begins inside a document has no memory of what came before. At an epoch's last step the rows that ran out are filled
    with pads. A target is the next token of the document, also where that token is another lane's input.

    A document's id in `documents_BT` is the position, counted through all epochs, at which it begins; after a new cut,
    that of the piece of it that was left. It is the same from step to step, and never the same for two in one row.

    The state is a few integers: the epoch, and for each number of rows used in it the steps taken. The next batch
    follows from it without a look at the data before.
    """

    def __init__(self, shards: TokenShards, sequence: int, seed: int) -> None:
        self._shards = shards
        self._sequence = sequence
        self._seed = seed
        self._start_epoch(0)

    def batch(self, rows: int) -> Batch:
        """The next step's batch of `rows` rows."""
        cut = self._cut if self._cut is not None and self._cut.rows == rows else self._recut(rows)
        step = self._steps_taken[-1][1]
        batch = self._assemble(cut, step)
        self._steps_taken[-1][1] = step + 1
        if step + 1 == cut.num_steps:
            self._start_epoch(self._number + 1)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position (`epoch`, `steps_taken`: [rows, steps] of each cut) and what it is a position in: integers."""
        return {
            "epoch": self._number,
            "steps_taken": [list(pair) for pair in self._steps_taken],
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`. Raises DataError when it belongs to other data, another seed or sequence."""
        check_position(state, self._identity())
        self._start_epoch(state["epoch"])
        for rows, steps in state["steps_taken"]:
            self._recut(rows)
            self._steps_taken[-1][1] = steps

    def _identity(self) -> dict[str, int]:
        return {
            "data.seed": self._seed,
            "data.sequence": self._sequence,
            "documents": self._shards.num_documents,
            "tokens": self._shards.num_tokens,
        }

    def _start_epoch(self, number: int) -> None:
        self._number = number
        self._epoch = Epoch(self._shards, self._seed, number)
        self._steps_taken: list[list[int]] = []
        self._cut: Cut | None = None

    def _recut(self, rows: int) -> Cut:
        if self._cut is None:
            unread = np.array([[0, self._shards.num_tokens]])
        else:
            unread = self._cut.unread(self._steps_taken[-1][1])
        self._cut = Cut(unread, rows, self._sequence)
        self._steps_taken.append([rows, 0])
        return self._cut

    def _assemble(self, cut: Cut, step: int) -> Batch:
        positions, span_begins = cut.step(step)
        # A document that spans two lanes is, after a new cut, in pieces with a gap between them: each has its own id.
        piece_begins = np.maximum(self._epoch.document_starts(positions), span_begins)
        ids = np.where(positions < 0, PAD, piece_begins + self._number * self._shards.num_tokens)
        tokens_BT = np.full((cut.rows, self._sequence), PAD_TOKEN, np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORE)
        for row in range(cut.rows):
            self._fill(tokens_BT[row], targets_BT[row], positions[row, 1:-1], ids[row, 1:-1])
        return Batch(
            torch.from_numpy(tokens_BT),
            torch.from_numpy(targets_BT),
            torch.from_numpy(ids[:, 1:-1].copy()),
            torch.from_numpy((ids[:, 0] == ids[:, 1]) & (ids[:, 1] != PAD)),
            torch.from_numpy((ids[:, -2] == ids[:, -1]) & (ids[:, -2] != PAD)),
        )

    def _fill(self, tokens_T: np.ndarray, targets_T: np.ndarray, positions_T: np.ndarray, ids_T: np.ndarray) -> None:
        """Read the runs of equal id of one row."""
        bounds = [0, *(np.flatnonzero(np.diff(ids_T)) + 1).tolist(), len(ids_T)]
        for begin, end in pairwise(bounds):
            if ids_T[begin] != PAD:
                run = slice(begin, end)
                first = int(positions_T[begin])
                tokens_T[run], targets_T[run] = self._epoch.read(first, first + end - begin)
