"""Logits of full texts equal those of the training loop, wherever their pads are."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.sleep.full_logits import compact, whole_logits
from tests.models import VOCABULARY, tiny_model
from tests.sleep.trained import texts, trained_logits

SLEEP = SleepConfig(passes=2, window=4)


def test_valid_tokens_come_first_in_their_order() -> None:
    order, counts = compact(torch.tensor([[False, True, False, True], [True, True, True, False]]))
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]] and counts.tolist() == [2, 3]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_logits_are_those_of_the_training_loop(side: str) -> None:
    model, rows = tiny_model(), texts([9, 6])
    tokens, valid = torch.full((2, 11), 3), torch.zeros(2, 11, dtype=torch.bool)
    for b, row in enumerate(rows):
        places = {"left": range(11 - len(row), 11), "right": range(len(row)), "middle": [0, *range(12 - len(row), 11)]}
        at = torch.tensor(places[side])
        tokens[b, at], valid[b, at] = row, True
    found = whole_logits(model, tokens, valid, valid, SLEEP)
    torch.testing.assert_close(found, torch.cat(trained_logits(model, rows, SLEEP)))


def test_only_marked_tokens_have_logits_and_their_windows_do_not_sleep() -> None:
    model, sleep = tiny_model(), SleepConfig(passes=3, window=4, when="unlabelled")
    [row] = texts([12])
    predicts = torch.arange(12)[None] >= 9
    found = whole_logits(model, row[None], torch.ones(1, 12, dtype=torch.bool), predicts, sleep)
    torch.testing.assert_close(found, trained_logits(model, [row], sleep, predicts_from=9)[0][9:])
    assert found.requires_grad


def test_without_a_marked_token_there_are_no_logits() -> None:
    nowhere = torch.zeros(2, 5, dtype=torch.bool)
    found = whole_logits(tiny_model(), torch.zeros(2, 5, dtype=torch.long), ~nowhere, nowhere, SLEEP)
    assert found.shape == (0, VOCABULARY) and found.dtype == torch.float64
