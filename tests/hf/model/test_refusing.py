"""Methods that would do nothing, or something wrong."""

from __future__ import annotations

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.hf.model.refusing import Refusing
from tests.hf.sleeping import sleeping
from tests.models import VOCABULARY

REFUSED_METHODS = {name: value for name, value in vars(Refusing).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", REFUSED_METHODS)
def test_methods_that_are_refused(name):
    arguments = {
        "resize_token_embeddings": (VOCABULARY + 1,), "set_attn_implementation": ("eager",),
        "get_correct_attn_implementation": ("flash_attention_2",), "set_use_kernels": (True,),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^(\w+\.?)+(\(\w+\)|='\w+')?: ."):
        getattr(sleeping(), name)(*arguments.get(name, ()))


def test_calls_without_effect_are_allowed():
    model = sleeping()
    assert model.resize_token_embeddings() is model.resize_token_embeddings(VOCABULARY) is model.model.embedding
    model.set_attn_implementation("sdpa")
    model.set_use_kernels(False)
    model.tie_weights()
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
