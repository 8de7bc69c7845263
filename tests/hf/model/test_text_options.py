"""The ids that end a text, and those that are never drawn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from sleeptrain.hf.model.text_options import OnlyText, end_ids


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, None, [2]), (3, None, [2, 3]), ([2, 9, 7], 5, [2, 7, 9]), (None, 5, [2, 5]), (None, [6, 5], [2, 5, 6])],
)
def test_every_eos_of_a_folder_ends_a_text(generation, config, expected):
    settings = SimpleNamespace(**({} if config is None else {"eos_token_id": config}))
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=generation), config=settings)
    assert end_ids(model, SimpleNamespace(eos_id=2)) == expected  # type: ignore[arg-type]


def test_only_ids_of_the_tokenizer_can_be_drawn():
    scores = OnlyText(3)(None, torch.ones(2, 5))
    assert torch.equal(scores[:, :3], torch.ones(2, 3))
    assert torch.isneginf(scores[:, 3:]).all()
