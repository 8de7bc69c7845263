from __future__ import annotations

import torch

from sleeptrain.data.batch import PAD
from sleeptrain.model.document_layout import first_of_document, sleep_layout, window_layout


def starts(row: list[int]) -> list[int]:
    return first_of_document(torch.tensor([row]))[0].nonzero().flatten().tolist()


def test_a_document_starts_where_the_last_valid_token_was_of_another():
    assert starts([0, 0, 1, 1, 2]) == [2, 4]
    assert starts([PAD, PAD, 0, 0]) == [], "the first document of a row goes on from what was carried"
    assert starts([0, PAD, PAD, 0, 0]) == []
    assert starts([0, PAD, 1, 1]) == [2]


def test_a_plain_window_needs_no_masks():
    documents = torch.zeros(2, 4, dtype=torch.long)
    layout = window_layout(documents, first_of_document(documents))
    assert layout.valid_RL is None and layout.reset_RL is None and layout.mask_RLL is None


def test_pads_attend_only_to_pads():
    documents = torch.tensor([[PAD, 0, 0, 1]])
    layout = window_layout(documents, first_of_document(documents))
    assert layout.mask_RLL[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert layout.valid_RL.tolist() == [[False, True, True, True]]
    assert layout.reset_RL.tolist() == [[False, False, False, True]]


def test_a_sleep_pass_reads_the_open_document_alone():
    layout = sleep_layout(torch.tensor([[0, 0, 1, 1], [2, 2, 2, PAD]]))
    assert layout.documents_RL.tolist() == [[PAD, PAD, 1, 1], [2, 2, 2, PAD]]
    assert layout.reset_RL is None


def test_retained_tokens_are_seen_within_the_window():
    documents = torch.tensor([[5, 5, 6]])
    layout = window_layout(documents, first_of_document(documents))
    mask = layout.with_retained(torch.tensor([[4, 5, 5]]), window=3)
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


def test_bounds_take_the_place_of_a_mask():
    documents = torch.tensor([[5, 5, 6, 6], [7, 7, 7, PAD]])
    layout = window_layout(documents, first_of_document(documents), with_bounds=True)
    assert layout.mask_RLL is None and layout.bounds.queries.tolist() == [0, 2, 4, 7, 8]
    assert layout.within(4) is layout and layout.reach is None
    near = layout.within(3)
    assert near.mask_RLL is None and near.reach == 3 and near.bounds is layout.bounds
    assert sleep_layout(documents, with_bounds=True).bounds.queries.tolist() == [0, 2, 4, 7, 8]
    assert not layout.reads_retained and window_layout(documents, first_of_document(documents)).reads_retained
