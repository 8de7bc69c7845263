"""Settings of Qwen3.5 and Qwen3-Next: those that they have, and those that they lack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import family_of, qwen
from tests.hf.models import HYBRID
from tests.models import tiny_config


def written(**changes: Any) -> dict[str, Any]:
    return family_of("qwen3_next").to_config(tiny_config(HYBRID)) | changes


def test_settings_that_they_lack_are_named() -> None:
    config = tiny_config(["mamba2", "attention", "gated_deltanet"], norm="plain", logits_divisor=2.0)
    config.attention = replace(config.attention, qk_norm="none", scale=0.3)
    config.gated_deltanet = replace(config.gated_deltanet, allow_neg_eigval=True)
    assert qwen.lacks(config) == {
        "model.layers with mamba2": "it has attention and gated_deltanet",
        "model.norm=plain": "it has zero_centred",
        "model.logits_divisor=2.0": "it has 1.0",
        "model.attention.qk_norm=none": "it has head",
        "model.attention.scale=0.3": "it has 0.0",
        "model.gated_deltanet.allow_neg_eigval=true": "it has false",
    }


def test_settings_of_absent_layers_do_not_matter() -> None:
    config = tiny_config(["attention"])
    config.gated_deltanet = replace(config.gated_deltanet, allow_neg_eigval=True)
    assert qwen.lacks(config) == {}


def test_settings_are_read_back() -> None:
    config = tiny_config(HYBRID)
    found = qwen.from_config("qwen3_next", written())
    assert found == replace(config, jet=found.jet, mamba2=found.mamba2), "but for layers that it lacks"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for qwen3_next, only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_parameters": None}, "config.json has no rope_theta, which qwen3_next needs"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types holds chunked, which sleeptrain does not have"),
    ],
)
def test_settings_that_sleeptrain_lacks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qwen.from_config("qwen3_next", written(**changes))


def test_a_missing_key_is_named() -> None:
    settings = written()
    del settings["linear_key_head_dim"]
    with pytest.raises(ConfigError, match=r"config\.json has no linear_key_head_dim, which qwen3_next needs"):
        qwen.from_config("qwen3_next", settings)
