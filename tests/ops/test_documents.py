from __future__ import annotations

import torch

from sleeptrain.ops.documents import document_facts

RESET = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
VALID = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)


def test_without_resets_and_pads_nothing_has_an_effect() -> None:
    assert document_facts(5, 2, None, None) == (None, None, None)


def test_taps_do_not_reach_across_a_reset() -> None:
    joined = document_facts(5, 2, RESET, None).joined_WBT1
    assert joined is not None
    assert joined[..., 0].long().tolist() == [
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]],
    ]


def test_the_tail_holds_the_last_valid_tokens_of_the_open_document() -> None:
    """Positions count from the tail before, which has two entries."""
    facts = document_facts(5, 2, RESET, VALID)
    assert facts.slot_BW is not None and facts.present_BW1 is not None
    assert facts.present_BW1[..., 0].tolist() == [[False, True], [True, True]]
    assert facts.slot_BW[0, 1] == 2 + 2
    assert facts.slot_BW[1].tolist() == [1, 2 + 1], "one entry of the tail before is still there"
