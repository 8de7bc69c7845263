"""Builds the tensors of a batch from pieces of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sleeptrain.data.assignment import Assignment, StreamSettings
from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.shards import DamagedDocument, TokenShards


class _Run(NamedTuple):
    """Consecutive tokens of one document in a row.

    length: number of tokens. id: id of the document. target: target of the last token.
    """

    length: int
    id: int
    target: int


class Assembler:
    """Reads the documents of `sources` into batches.

    skip_damaged: if true, the tokens of a document that cannot be read become pads, and `damaged` receives the document
    as (source, shard, number in the shard); otherwise DamagedDocument is raised.

    The id of a document in `documents_BT` is line position * number of sources + number of the source. The line
    position is that of the first token of the document that the row's lane holds. The id stays the same from step to
    step, and no two documents of a row have the same id.
    """

    def __init__(self, sources: Sequence[TokenShards], settings: StreamSettings, skip_damaged: bool = False) -> None:
        self.damaged: set[tuple[int, int, int]] = set()
        self._sources = sources
        self._sequence = settings.sequence
        self._stands_alone = settings.layout == "packed"
        self._skip_damaged = skip_damaged
        self._unfinished: dict[int, tuple[tuple[int, int, int], np.ndarray]] = {}  # by row

    def batch(self, assignment: Assignment, rows: range, step: int) -> Batch:
        """The batch of step `step` for `rows`, which are numbers of rows of the assignment."""
        shape = (len(rows), self._sequence)
        tokens_BT = np.empty(shape, np.int64)
        carried_B, continues_B = np.zeros((2, len(rows)), bool)
        runs: list[_Run] = []
        for i, row in enumerate(rows):
            first = len(runs)
            begin, end = self._read(row, assignment.pieces(step, row), step * self._sequence, tokens_BT[i], runs)
            if not self._stands_alone:
                carried_B[i] = begin < step * self._sequence and runs[first].id != PAD
                continues_B[i] = end > (step + 1) * self._sequence and runs[-1].id != PAD
        lengths_R, ids_R, targets_R = np.array(runs, np.int64).reshape(-1, 3).T
        documents_BT = ids_R.repeat(lengths_R).reshape(shape)
        targets_BT = np.empty(shape, np.int64)
        targets_BT.reshape(-1)[:-1] = tokens_BT.reshape(-1)[1:]
        targets_BT.reshape(-1)[lengths_R.cumsum() - 1] = targets_R
        if (ids_R == PAD).any():
            targets_BT[documents_BT == PAD] = IGNORE
        return Batch(*map(torch.from_numpy, (tokens_BT, targets_BT, documents_BT, carried_B, continues_B)))

    def _read(
        self, row: int, pieces: np.ndarray, start: int, tokens_T: np.ndarray, runs: list[_Run]
    ) -> tuple[int, int]:
        """Fill the tokens of a row that begins at row position `start`, and append their runs to `runs`.

        Returns the row positions at which the row's first document begins and its last document ends.
        """
        stop = start + self._sequence
        filled, end = 0, start
        for begin, _, line, offset, length, source, shard, index in pieces.tolist():
            end = begin + length
            to = min(end, stop) - start
            document = self._document(row, (source, shard, index), keep=end > stop)
            if document is None:
                tokens_T[filled:to] = PAD_TOKEN
                runs.append(_Run(to - filled, PAD, IGNORE))
            else:
                first = offset + start + filled - begin
                last = first + to - filled
                tokens_T[filled:to] = document[first:last]
                # The last token of a document has no target, because the next token belongs to another document.
                target = int(document[last]) if last < len(document) else IGNORE
                runs.append(_Run(to - filled, line * len(self._sources) + source, target))
            filled = to
        if filled < self._sequence:
            tokens_T[filled:] = PAD_TOKEN
            runs.append(_Run(self._sequence - filled, PAD, IGNORE))
        return int(pieces["begin"][0]), end

    def _document(self, row: int, which: tuple[int, int, int], keep: bool) -> np.ndarray | None:
        """All tokens of a document, or None if it is damaged and skipped.

        which: (source, shard, number in the shard). keep: the row continues the document in the next step; the tokens
        are kept until then, so that the document is read and checked once.
        """
        unfinished = self._unfinished.get(row)
        if unfinished is not None and unfinished[0] == which:
            document = unfinished[1]
        else:
            source, shard, index = which
            try:
                document = self._sources[source].document(shard, index)
            except DamagedDocument as error:
                if not self._skip_damaged:
                    # Not in the error itself, because held-out data cannot skip damage.
                    way_out = "or set data.shards.on_damage=skip to go on without it"
                    raise DamagedDocument(f"{error}, {way_out}", shard, index) from error
                self.damaged.add(which)
                return None
        if keep:
            self._unfinished[row] = (which, document)
        return document
