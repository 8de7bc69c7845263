"""Qwen3.5: the text model inside one that sees images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.hf.families.qwen3_5_text import Qwen35Text
from tests.hf.models import HYBRID
from tests.models import tiny_config

FAMILY = Qwen35Text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.visual.patch_embed.proj.weight", None),
        ("mtp.layers.0.mlp.up_proj.weight", None),
    ],
)
def test_tensors_outside_the_text_model_are_ignored(name: str, expected: str | None) -> None:
    assert FAMILY.canonical(name) == expected


@pytest.mark.parametrize(("width", "fraction"), [(256, 0.25), (128, 1.0), (8, 0.25), (64, 0.5)])
def test_sections_hold_all_rotated_pairs(width: int, fraction: float) -> None:
    config = tiny_config(HYBRID)
    config.attention = replace(config.attention, head_dim=width, partial_rotary_factor=fraction)
    sections = FAMILY.to_config(config)["rope_parameters"]["mrope_section"]
    assert len(sections) == 3 and 2 * sum(sections) == int(width * fraction)


def test_the_projections_keep_their_names() -> None:
    names = {name for mapping in FAMILY.mappings(tiny_config(HYBRID)) for name in mapping.theirs}
    assert {f"model.layers.0.linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")} <= names
