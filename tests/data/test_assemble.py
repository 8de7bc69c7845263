from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sleeptrain.data.assemble import Assembler
from sleeptrain.data.assignment import StreamSettings
from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.rows import ROW_PIECE
from sleeptrain.data.shards import DamagedDocument
from tests.data.numbered import NumberedShards, mixture

LENGTHS = [[4, 9], [3, 30]]  # tokens 0-3, 4-12, 13-15, 16-45


class Reading(NumberedShards):
    """Tokens are 0, 1, 2, ...; `read` lists the documents that have been read."""

    read: list[tuple[int, int]]

    def document(self, shard: int, index: int) -> np.ndarray:
        self.read = [*getattr(self, "read", []), (shard, index)]
        return super().document(shard, index) // 8


class Pieces:
    """An assignment of these pieces (begin, size, line, offset, length, source, shard, index), by row."""

    def __init__(self, *rows: Sequence[tuple[int, ...]]) -> None:
        self._rows = [np.array(row, ROW_PIECE) for row in rows]

    def pieces(self, step: int, row: int) -> np.ndarray:
        pieces = self._rows[row]
        return pieces[(pieces["begin"] + pieces["size"] > step * 8) & (pieces["begin"] < step * 8 + 8)]


def assembler(shards: NumberedShards, layout: str = "lanes", **options: bool) -> Assembler:
    return Assembler([shards, shards], StreamSettings(8, mixture(a=1), layout), **options)  # type: ignore[list-item]


def assemble(assembly: Assembler, assignment: Pieces, rows: range, step: int) -> Batch:
    return assembly.batch(assignment, rows, step)  # type: ignore[arg-type]


def test_pieces_become_tokens_targets_ids_and_flags() -> None:
    # The end of a document, a whole document, one of which the lane's cut leaves the last 5 tokens, and a long one.
    row = [(0, 4, 100, 0, 4, 0, 0, 0), (4, 3, 7, 0, 3, 1, 1, 0), (7, 2, 40, 4, 2, 0, 0, 1), (9, 30, 50, 0, 30, 1, 1, 1)]
    assembly, assignment = assembler(Reading(LENGTHS)), Pieces(row)
    first, second = (assemble(assembly, assignment, range(1), step) for step in range(2))
    assert first.tokens_BT.tolist() == [[0, 1, 2, 3, 13, 14, 15, 8]]
    assert first.targets_BT.tolist() == [[1, 2, 3, IGNORE, 14, 15, IGNORE, 9]]
    assert first.documents_BT.tolist() == [[200] * 4 + [15] * 3 + [80]]
    assert (first.carried_B.tolist(), first.continues_B.tolist()) == ([False], [True])
    # The lane is cut after token 9 of the document 4-12, but its target is 10.
    assert second.tokens_BT.tolist() == [[9, 16, 17, 18, 19, 20, 21, 22]]
    assert second.targets_BT.tolist() == [[10, 17, 18, 19, 20, 21, 22, 23]]
    assert second.documents_BT.tolist() == [[80] + [101] * 7]
    assert (second.carried_B.tolist(), second.continues_B.tolist()) == ([True], [True])
    assert all(getattr(first, name).dtype == torch.int64 for name in ("tokens_BT", "targets_BT", "documents_BT"))
    assert first.carried_B.dtype == first.continues_B.dtype == torch.bool


def test_a_document_that_ends_with_the_row_does_not_continue() -> None:
    row = [(0, 4, 0, 0, 4, 0, 0, 0), (4, 4, 16, 0, 4, 0, 1, 1), (8, 9, 4, 0, 9, 0, 0, 1)]
    assembly, assignment = assembler(Reading(LENGTHS)), Pieces(row)
    first, second = (assemble(assembly, assignment, range(1), step) for step in range(2))
    assert first.targets_BT[0, 7] == 20  # its lane ends here, the document does not
    assert not first.continues_B.any() and not second.carried_B.any() and second.continues_B.all()


def test_pads_stand_after_the_only_document_of_a_row() -> None:
    rows = [(0, 16, 0, 0, 9, 0, 0, 1)], [(0, 8, 16, 0, 3, 0, 1, 0), (8, 32, 32, 0, 30, 0, 1, 1)]
    assembly, assignment = assembler(Reading(LENGTHS), "one_document"), Pieces(*rows)
    first, second = (assemble(assembly, assignment, range(2), step) for step in range(2))
    assert first.tokens_BT.tolist() == [list(range(4, 12)), [13, 14, 15] + [PAD_TOKEN] * 5]
    assert first.documents_BT.tolist() == [[0] * 8, [32] * 3 + [PAD] * 5]
    assert first.targets_BT.tolist() == [list(range(5, 13)), [14, 15] + [IGNORE] * 6]
    assert first.continues_B.tolist() == [True, False]
    assert second.tokens_BT.tolist() == [[12] + [PAD_TOKEN] * 7, list(range(16, 24))]
    assert second.targets_BT.tolist()[0] == [IGNORE] * 8
    assert second.carried_B.tolist() == [True, False] and second.continues_B.tolist() == [False, True]


def test_packed_rows_are_not_carried() -> None:
    assembly, assignment = assembler(Reading(LENGTHS), "packed"), Pieces([(0, 30, 16, 0, 30, 0, 1, 1)])
    for step in range(3):
        batch = assemble(assembly, assignment, range(1), step)
        assert not batch.carried_B.any() and not batch.continues_B.any()
        assert batch.tokens_BT.tolist() == [list(range(16 + 8 * step, 24 + 8 * step))]


def test_rows_are_numbers_of_the_assignment() -> None:
    assignment = Pieces(*[[(0, 30, 16, 8 * row, 30 - 8 * row, 0, 1, 1)] for row in range(3)])
    assembly = assembler(Reading(LENGTHS))
    assert assemble(assembly, assignment, range(1, 3), 0).tokens_BT[:, 0].tolist() == [24, 32]
    empty = assemble(assembly, assignment, range(2, 2), 0)
    assert empty.tokens_BT.shape == empty.targets_BT.shape == empty.documents_BT.shape == (0, 8)
    assert empty.carried_B.shape == empty.continues_B.shape == (0,)


def test_a_document_over_two_steps_is_read_once() -> None:
    shards = Reading(LENGTHS)
    assembly, assignment = assembler(shards), Pieces([(0, 30, 16, 0, 30, 0, 1, 1), (30, 9, 4, 0, 9, 0, 0, 1)])
    for step in range(4):
        assemble(assembly, assignment, range(1), step)
    assert shards.read == [(1, 1), (0, 1)]


def test_steps_may_come_in_any_order() -> None:
    row = [(0, 30, 16, 0, 30, 0, 1, 1), (30, 9, 4, 0, 9, 0, 0, 1), (39, 30, 80, 0, 30, 0, 1, 1)]
    assembly, assignment = assembler(Reading(LENGTHS)), Pieces(row)
    for step in [3, 0, 5, 1, 1, 4, 2]:
        fresh = assemble(assembler(Reading(LENGTHS)), assignment, range(1), step)
        again = assemble(assembly, assignment, range(1), step)
        assert all(torch.equal(getattr(fresh, name), getattr(again, name)) for name in Batch.__dataclass_fields__)


def test_the_tokens_of_a_damaged_document_become_pads() -> None:
    row = [(0, 4, 0, 0, 4, 0, 0, 0), (4, 9, 4, 0, 9, 0, 0, 1), (13, 3, 13, 0, 3, 1, 1, 0)]
    shards = Reading(LENGTHS, damaged=[(0, 1)])
    assembly, assignment = assembler(shards, skip_damaged=True), Pieces(row)
    first, second = (assemble(assembly, assignment, range(1), step) for step in range(2))
    assert first.documents_BT.tolist() == [[0] * 4 + [PAD] * 4]
    assert first.tokens_BT.tolist() == [[0, 1, 2, 3] + [PAD_TOKEN] * 4]
    assert first.targets_BT.tolist() == [[1, 2, 3] + [IGNORE] * 5]
    assert second.documents_BT.tolist() == [[PAD] * 5 + [27] * 3]
    assert second.targets_BT.tolist() == [[IGNORE] * 5 + [14, 15, IGNORE]]
    assert not first.continues_B.any() and not second.carried_B.any()
    assert assembly.damaged == {(0, 0, 1)}
    with pytest.raises(DamagedDocument):
        assemble(assembler(shards), assignment, range(1), 0)
