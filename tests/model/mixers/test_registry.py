"""The spec of each block's mixer."""

from __future__ import annotations

import pytest

from sleeptrain.config.mixers import BUILT_IN
from sleeptrain.errors import ConfigError
from sleeptrain.model.mixers.attention import AttentionSpec
from sleeptrain.model.mixers.registry import block_spec, mixer_spec, mixer_specs, spec_class
from sleeptrain.model.mixers.sliding_attention import SlidingAttentionSpec
from tests.models import tiny_config


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_spec_has_the_settings_of_its_mixer(kind: str) -> None:
    model = tiny_config([kind])
    spec = mixer_spec(model, kind)
    assert type(spec) is spec_class(kind) and spec.kind == kind and spec.model is model
    assert type(spec.settings) is spec.settings_class


def test_each_kind_of_a_model_once_and_in_order() -> None:
    model = tiny_config(["sliding_attention", "jet", "attention", "jet"])
    assert [spec.kind for spec in mixer_specs(model)] == ["sliding_attention", "jet", "attention"]
    assert type(block_spec(model, 0)) is SlidingAttentionSpec and type(block_spec(model, 2)) is AttentionSpec


def test_an_unknown_mixer_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown mixer 'atention'; did you mean 'attention'"):
        spec_class("atention")
