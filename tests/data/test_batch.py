"""Rows of a batch: micro-batches, and the shares of the ranks."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.data.batch import Batch, Part


def test_a_micro_batch_has_the_rows_of_all_tensors() -> None:
    grid, flags = torch.arange(12).view(4, 3), torch.tensor([True, False, True, False])
    part = Batch(grid, grid + 100, grid + 200, flags, ~flags).rows(1, 3)
    assert part.tokens_BT.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert torch.equal(part.targets_BT, part.tokens_BT + 100) and torch.equal(part.documents_BT, part.tokens_BT + 200)
    assert part.carried_B.tolist() == [False, True] and part.continues_B.tolist() == [True, False]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_ranks_read_all_rows_in_order(ranks: int) -> None:
    parts = [Part(rank, ranks).rows(12) for rank in range(ranks)]
    assert [row for part in parts for row in part] == list(range(12))
    assert {len(part) for part in parts} == {12 // ranks}
