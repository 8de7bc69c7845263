"""Predictions of held-out rows: which ones count, and which ones are right."""

from __future__ import annotations

import torch

from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.tasks.task import Answered


def test_only_positions_with_a_target_can_be_right() -> None:
    targets = torch.tensor([[IGNORE, 3, 4], [5, IGNORE, IGNORE]])
    no = torch.zeros(2, dtype=torch.bool)
    batch = Batch(torch.zeros_like(targets), targets, torch.zeros_like(targets), no, no)
    answered = Answered(batch, torch.tensor([[IGNORE, 3, 5], [5, 7, IGNORE]]), torch.zeros(2, 3))
    assert answered.wanted_BT.tolist() == [[False, True, True], [True, False, False]]
    assert answered.right_BT.tolist() == [[False, True, False], [True, False, False]]
