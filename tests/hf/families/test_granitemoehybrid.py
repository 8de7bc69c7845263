"""Granite's settings: two names for its layers, positions or none, and multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.granitemoehybrid import GraniteMoeHybrid
from tests.hf.models import MULTIPLIED, granite

FAMILY = GraniteMoeHybrid()


def test_layers_are_read_under_both_names() -> None:
    written = FAMILY.to_config(granite())
    assert written["layer_types"] == ["mamba", "attention", "mamba"]
    renamed = written | {"layer_types": ["linear_attention", "full_attention", "mamba"]}
    assert FAMILY.from_config(renamed).layers == ["mamba2", "attention", "mamba2"]


@pytest.mark.parametrize(("rotary", "positions"), [(0.0, None), (1.0, "rope")])
def test_positions_are_optional(rotary: float, positions: str | None) -> None:
    written = FAMILY.to_config(granite(rotary))
    assert written["position_embedding_type"] == positions
    assert FAMILY.from_config(written).attention.partial_rotary_factor == rotary


def test_a_usual_scale_is_none_and_another_stays() -> None:
    assert FAMILY.from_config(FAMILY.to_config(granite())).attention.scale == 0.0
    multiplied = FAMILY.from_config(FAMILY.to_config(granite(**MULTIPLIED)))
    assert multiplied.attention.scale == 0.3
    assert {name: getattr(multiplied, name) for name in MULTIPLIED} == MULTIPLIED


def test_settings_that_granite_lacks_are_named() -> None:
    config = granite(rotary=0.5)
    config.attention = replace(config.attention, gate=True)
    config.mamba2 = replace(config.mamba2, num_groups=2, num_heads=3)
    assert FAMILY.lacks(config) == {
        "model.attention.gate=true": "it has false",
        "model.attention.partial_rotary_factor=0.5": "it has 0, no positions, and 1",
        "model.mamba2.num_groups=2": "it has 1",
        "model.mamba2.num_heads=3 of head_dim=8": "together they are a multiple of model.dim=16",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 4}, "num_local_experts=4 is not supported for granitemoehybrid, only 0"),
        ({"mamba_n_groups": 2}, "mamba_n_groups=2 is not supported"),
        ({"time_step_limit": [0.1, 1.0]}, "time_step_limit=.* is not supported, only none"),
        ({"layer_types": ["mamba", "moe", "mamba"]}, "layer_types holds moe, which sleeptrain does not have"),
    ],
)
def test_settings_that_sleeptrain_lacks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_config(FAMILY.to_config(granite()) | change)


def test_groups_matter_only_to_mamba() -> None:
    written = FAMILY.to_config(granite(layers=["attention"])) | {"mamba_n_groups": 2}
    assert FAMILY.from_config(written).layers == ["attention"]


def test_gate_and_up_are_one_matrix() -> None:
    [mapping] = [m for m in FAMILY.mappings(granite(layers=["attention"])) if len(m.ours) == 2]
    gate, up = torch.randn(24, 16), torch.randn(24, 16)
    [joined] = mapping.to_theirs(gate, up)
    assert mapping.theirs == ("model.layers.0.shared_mlp.input_linear.weight",)
    assert torch.equal(joined[:24], gate) and all(map(torch.equal, mapping.to_ours(joined), (gate, up)))
