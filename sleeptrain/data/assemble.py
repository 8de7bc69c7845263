"""From pieces of documents to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sleeptrain.data.assignment import Assignment, StreamSettings
from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.shards import DamagedDocument, TokenShards


class _Run(NamedTuple):
    """Tokens of one document in a row: how many, the document's id, and the target of the last one."""

    length: int
    id: int
    target: int


class Assembler:
    """Reads the documents of `sources` into batches.

    skip_damaged: the tokens of a document that cannot be read become pads, and the document is put into `damaged` as
    (source, shard, number in the shard); otherwise DamagedDocument is raised.

    The id of a document in `documents_BT` is the position of its first token (of the first one that the row's lane
    holds) on the line of its source, times the number of sources, plus the number of the source. It is the same from
    step to step, and never the same for two in one row.
    """

    def __init__(self, sources: Sequence[TokenShards], settings: StreamSettings, skip_damaged: bool = False) -> None:
        self.damaged: set[tuple[int, int, int]] = set()
        self._sources = sources
        self._sequence = settings.sequence
        self._stands_alone = settings.layout == "packed"
        self._skip_damaged = skip_damaged
        self._unfinished: dict[int, tuple[tuple[int, int, int], np.ndarray]] = {}  # by row

    def batch(self, assignment: Assignment, rows: range, step: int) -> Batch:
        """Step `step` of `rows`, the numbers of rows of the assignment."""
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
        """Fill the tokens of a row that begins at position `start`, and append what they are to `runs`.

        Returns the row positions at which the first of its documents begins and the last one ends.
        """
        stop = start + self._sequence
        at, end = 0, start
        for begin, _, line, offset, length, source, shard, index in pieces.tolist():
            end = begin + length
            to = min(end, stop) - start
            document = self._document(row, (source, shard, index), keep=end > stop)
            if document is None:
                tokens_T[at:to] = PAD_TOKEN
                runs.append(_Run(to - at, PAD, IGNORE))
            else:
                first = offset + start + at - begin
                last = first + to - at
                tokens_T[at:to] = document[first:last]
                # The target of a document's last token is none: what comes after it was written by somebody else.
                target = int(document[last]) if last < len(document) else IGNORE
                runs.append(_Run(to - at, line * len(self._sources) + source, target))
            at = to
        if at < self._sequence:
            tokens_T[at:] = PAD_TOKEN
            runs.append(_Run(self._sequence - at, PAD, IGNORE))
        return int(pieces["begin"][0]), end

    def _document(self, row: int, which: tuple[int, int, int], keep: bool) -> np.ndarray | None:
        """All tokens of a document, or None where it is damaged and skipped.

        A document that the row goes on with at the next step is kept until then, so that it is read and checked once.
        """
        kept = self._unfinished.get(row)
        if kept is not None and kept[0] == which:
            document = kept[1]
        else:
            source, shard, index = which
            try:
                document = self._sources[source].document(shard, index)
            except DamagedDocument as error:
                if not self._skip_damaged:
                    way_out = "or set data.shards.on_damage=skip to go on without it"  # here: held-out data has none
                    raise DamagedDocument(f"{error}, {way_out}", shard, index) from error
                self.damaged.add(which)
                return None
        if keep:
            self._unfinished[row] = (which, document)
        return document
