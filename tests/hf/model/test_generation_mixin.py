"""The interface to transformers: both names of a cache, and the private parts that this package uses."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import transformers
from transformers import Cache, PreTrainedModel

from sleeptrain.errors import ConfigError
from sleeptrain.hf.model.cache import CACHE_NAME, SleepCache
from sleeptrain.hf.model.generation_mixin import SleepGeneration
from sleeptrain.hf.model.modeling import SleepForCausalLM
from tests.hf.sleeping import gated, padded, sleeping
from tests.models import tiny_model
from tests.sleep.gates import gated_settings
from tests.sleep.trained import texts, trained_logits

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 17}
NAMES = ("cache", "past_key_values")

# Each begins with an underscore in transformers, and this package defines it, too. Generation overrides none.
PRIVATE = {
    "_init_weights": "every model of transformers defines it: Hybrid draws its own weights, nothing is drawn again",
    "_is_stateful": "a class attribute that says that assisted generation cannot be",
    "_keep_in_fp32_modules_strict": "a class attribute that keeps the decays in fp32 whatever the dtype",
    "_no_split_modules": "a class attribute that every model of transformers has, for `device_map`",
    "_supports_sdpa": "a class attribute without which `attn_implementation` is refused",
}


def test_no_other_private_part_of_transformers_is_overridden():
    theirs = {name for kind in (PreTrainedModel, transformers.GenerationMixin, Cache) for name in dir(kind)}
    ours = {name for kind in (SleepForCausalLM, SleepGeneration, SleepCache) for name in vars(kind)}
    found = {name for name in ours & theirs if name.startswith("_") and not name.startswith("__")}
    # Attributes that transformers sets on each new class.
    automatic = {"_auto_class", "_can_record_outputs", "_abc_impl"} | set(vars(_Subclass))
    assert found - automatic == set(PRIVATE)


class _Subclass(SleepForCausalLM):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_has_two_names(name):
    model, (row,) = sleeping(), texts([15])
    expected = model.generate(row[None], **GREEDY)
    memory = model.read(row[None, 6:10], **{name: model.read(row[None, :6])})
    assert memory.boundaries == (2,)
    out = model.generate(row[None, 10:], **{name: memory}, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, 5:], expected[:, 15:])
    assert out.past_key_values is memory
    assert out[CACHE_NAME] is memory
    beams = model.generate(
        row[None, 10:], **{name: model.read(row[None, :10].expand(2, -1))}, **GREEDY, num_beams=2,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert beams.past_key_values is beams[CACHE_NAME]
    with torch.no_grad():
        first = model(row[None, :10], use_cache=True)
        after = model(row[None, 10:], **{name: first.past_key_values})
    assert after.past_key_values is first.past_key_values
    assert after[CACHE_NAME] is first[CACHE_NAME]
    assert after.logits[0, -1].argmax() == expected[0, 15]


def test_two_caches_are_refused():
    model, (row,) = sleeping(), texts([6])
    one, other = (model.read(row[None]) for _ in NAMES)
    for call in (model, model.read, model.generate):
        with pytest.raises(ConfigError, match="two names of the same"):
            call(row[None], cache=one, past_key_values=other)
        with pytest.raises(ConfigError, match="the cache is a DynamicCache: this model keeps a SleepCache"):
            call(row[None], cache=transformers.DynamicCache())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_nothing_deprecated_is_used(options, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    try:
        sleeping().generate(**padded(texts([9, 5])), **GREEDY, **options)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.messages if "deprecat" in record]


def test_positional_arguments_have_the_order_of_transformers():
    theirs = list(inspect.signature(transformers.GenerationMixin.generate).parameters)
    ours = list(inspect.signature(SleepForCausalLM.generate).parameters)
    assert ours[:5] == theirs[:5]


def test_a_prompt_of_bos_alone():
    model = sleeping()
    found = model.generate(**GREEDY, bos_token_id=1, num_return_sequences=2, num_beams=2)
    assert torch.equal(found, model.generate(torch.tensor([[1]]), **GREEDY, num_return_sequences=2, num_beams=2))
    assert len(found) == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_gated_model_generates_what_the_training_loop_predicts(use_cache, tmp_path):
    rows = texts([13, 9, 18, 16])
    settings = gated_settings(tiny_model(), rows, tmp_path / "gate.safetensors")
    model = gated(settings)
    options = GREEDY | {"max_new_tokens": 14, "use_cache": use_cache}
    out = model.generate(**padded(rows), **options)
    for b, row in enumerate(rows):
        text = torch.cat([row, out[b, out.shape[1] - 14 :]])
        [logits] = trained_logits(model.model, [text], settings)
        assert torch.equal(logits[len(row) - 1 : -1].argmax(-1), text[len(row) :])
