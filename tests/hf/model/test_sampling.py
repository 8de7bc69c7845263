"""Token by token: rows that end, and the tokens that are read of them."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria

from tests.hf.sleeping import padded, sleeping
from tests.sleep.trained import texts

EOS = 3  # greedy answers of these models hold this id; rows that have ended are padded with it
NEW = 9
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS}


def up_to_end(ids: torch.Tensor) -> torch.Tensor:
    """bool: True up to the first EOS of each row."""
    ends = (ids == EOS).long()
    return ends.cumsum(1) - ends == 0


def test_rows_that_a_criterion_ends_go_on_without_an_eos_id():
    class FirstRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):  # type: ignore[no-untyped-def]
            return torch.tensor([True, input_ids.shape[1] > 12])

    model, batch = sleeping(), padded(texts([9, 4]))
    options = OPTIONS | {"eos_token_id": None}
    found = model.generate(**batch, **options, stopping_criteria=[FirstRow()])
    assert torch.equal(found, model.generate(**batch, **options)[:, : found.shape[1]])


@pytest.mark.parametrize("pad", [-1, 10**6])
def test_rows_are_padded_with_an_id_that_the_model_lacks(pad: int):
    model, batch = sleeping(), padded(texts([9, 4, 12]))
    expected = model.generate(**batch, **OPTIONS)
    for use_cache in (True, False):
        found = model.generate(**batch, **OPTIONS | {"pad_token_id": pad}, use_cache=use_cache)
        assert (found == pad).any()
        assert torch.equal(found.where(found != pad, EOS), expected)


def test_sampling_with_rows_that_end():
    model, batch = sleeping(), padded(texts([9, 5]))
    options = OPTIONS | {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(**batch, **options, use_cache=use_cache))
    assert torch.equal(*found)
    assert not up_to_end(found[0][:, 9:]).all()
