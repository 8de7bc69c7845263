"""Targets from labels, each of which is at its own token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sleeptrain.data.batch import IGNORE
from sleeptrain.hf.model.labels import mean_loss, targets, with_label

LABELS = torch.tensor([[9, 10, 11, 12, 13], [9, 10, 11, 12, 13]])
LEFT = torch.tensor([[True] * 5, [False, False, True, True, True]])
RIGHT = torch.tensor([[True] * 5, [True, True, True, False, False]])
BETWEEN = torch.tensor([[True] * 5, [True, False, True, False, True]])


def test_each_token_has_the_next_one_of_its_row() -> None:
    assert targets(LABELS, LEFT).tolist() == [[10, 11, 12, 13, IGNORE], [IGNORE, IGNORE, 12, 13, IGNORE]]
    assert targets(LABELS, RIGHT)[1].tolist() == [10, 11, IGNORE, IGNORE, IGNORE]
    assert targets(LABELS, BETWEEN)[1].tolist() == [11, IGNORE, 13, IGNORE, IGNORE]


def test_an_ignored_token_is_no_target_but_has_one() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 11, 12]])
    assert targets(labels, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[IGNORE, 11, 12, IGNORE]]


def test_windows_with_a_target_are_marked_but_not_pads() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, IGNORE, 5, 6], [IGNORE, IGNORE, IGNORE, 4, IGNORE, IGNORE]])
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 0] = False
    # Windows of two tokens; the label of a token is the target of the one before it.
    assert with_label(labels, valid, 2).tolist() == [[False, False, True, True, True, True],
                                                     [False, True, True, False, False, False]]  # fmt: skip
    assert not with_label(torch.full((1, 6), IGNORE), valid[:1], 2).any()


def test_the_loss_is_the_mean_over_the_targets_of_the_last_columns() -> None:
    logits = torch.randn(2, 5, 14, generator=torch.Generator().manual_seed(0))
    rows, columns = zip(*[(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)], strict=True)
    expected = F.cross_entropy(logits[rows, columns], torch.tensor([10, 11, 12, 13, 12, 13]))
    torch.testing.assert_close(mean_loss(logits, LABELS, LEFT), expected)
    last = F.cross_entropy(logits[[0, 1], [3, 3]], torch.tensor([13, 13]))
    torch.testing.assert_close(mean_loss(logits[:, 3:], LABELS, LEFT), last)
