"""OLMo's settings: no positions without a theta, and separate q, k and v of Gated DeltaNet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.olmo_hybrid import OlmoHybrid
from tests.hf.models import olmo

FAMILY = OlmoHybrid()


def test_without_a_theta_there_are_no_positions() -> None:
    written = FAMILY.to_config(olmo(rotary=0.0))
    assert written["rope_parameters"]["rope_theta"] is None
    assert FAMILY.from_config(written).attention.partial_rotary_factor == 0.0
    turned = FAMILY.to_config(olmo(rotary=1.0))
    assert FAMILY.from_config(turned).attention.partial_rotary_factor == 1.0
    assert FAMILY.from_config(turned | {"rope_parameters": None}).attention.partial_rotary_factor == 0.0


def test_scaled_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="rope_type='yarn' is not supported, only 'default'"):
        FAMILY.from_config(FAMILY.to_config(olmo()) | {"rope_parameters": {"rope_type": "yarn"}})


def test_settings_that_olmo_lacks_are_named() -> None:
    config = replace(olmo(rotary=0.5, embedding_multiplier=2.0), layers=["attention", "attention"])
    assert FAMILY.lacks(config) == {
        "model.layers without gated_deltanet": "it has both",
        "model.embedding_multiplier=2.0": "it has 1.0",
        "model.attention.partial_rotary_factor=0.5": "it has 0, no positions, and 1",
    }
    other = olmo()
    other.gated_deltanet = replace(other.gated_deltanet, norm_eps=1e-6)
    assert FAMILY.lacks(other) == {"model.gated_deltanet.norm_eps=1e-06": "it has 1e-05"}


def test_each_kind_of_layer_has_norms_of_its_own_names() -> None:
    names = {name for mapping in FAMILY.mappings(olmo()) for name in mapping.theirs}
    assert {"model.layers.0.attention_layer_norm.weight", "model.layers.0.feedforward_layer_norm.weight"} <= names
    assert {f"model.layers.1.post_{part}_layernorm.weight" for part in ("attention", "feedforward")} <= names


def test_q_k_and_v_are_cut_and_joined() -> None:
    mappings = {m.ours: m for m in FAMILY.mappings(olmo())}
    projections, kernels = mappings["blocks.0.mixer.in_proj_qkv.weight",], mappings["blocks.0.mixer.conv_weight",]
    matrix, taps = torch.randn(16 + 16 + 24, 16), torch.randn(16 + 16 + 24, 4)
    parts = projections.to_theirs(matrix)
    assert [part.shape[0] for part in parts] == [16, 16, 24] and torch.equal(projections.to_ours(*parts)[0], matrix)
    cut = kernels.to_theirs(taps)
    assert [tuple(part.shape) for part in cut] == [(16, 1, 4), (16, 1, 4), (24, 1, 4)]
    assert torch.equal(kernels.to_ours(*cut)[0], taps)
