"""Shared by Qwen3.5 and Qwen3-Next: gated attention with q/k norms and partial RoPE, Gated DeltaNet, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.hf.families.family import (
    MULTIPLIERS,
    TensorMapping,
    check_rope,
    common_settings,
    conv_mapping,
    expect,
    foreign_mixers,
    layer_kinds,
    mlp_mappings,
    other_values,
    rename,
    renamed,
    setting,
    top_mappings,
)

LAYER_TYPES = {"attention": "full_attention", "gated_deltanet": "linear_attention"}
# Maps (our prefix, their prefix) of a Gated DeltaNet mixer to the mappings of its input projections.
Projections = Callable[[str, str], list[TensorMapping]]


def lacks(config: ModelConfig) -> dict[str, str]:
    lacking = foreign_mixers(config, tuple(LAYER_TYPES))
    wanted: dict[str, Any] = {"norm": "zero_centred"} | dict.fromkeys(MULTIPLIERS, 1.0)
    if "attention" in config.layers:
        wanted |= {"attention.gate": True, "attention.qk_norm": "head", "attention.scale": 0.0}
        wanted |= {"attention.post_norm": False}
    if "gated_deltanet" in config.layers:
        wanted |= {"gated_deltanet.allow_neg_eigval": False, "gated_deltanet.norm_eps": 0.0}
    return lacking | other_values(config, wanted)


def describe(config: ModelConfig) -> dict[str, Any]:
    attention, delta = config.attention, config.gated_deltanet
    return {
        "layer_types": [LAYER_TYPES[kind] for kind in config.layers],
        "attention_bias": False,
        "head_dim": attention.head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": attention.partial_rotary_factor,
        },
        "linear_num_key_heads": delta.num_k_heads,
        "linear_num_value_heads": delta.num_v_heads,
        "linear_key_head_dim": delta.head_k_dim,
        "linear_value_head_dim": delta.head_v_dim,
        "linear_conv_kernel_dim": delta.conv_size,
    }


def from_config(model_type: str, config_dict: Mapping[str, Any]) -> ModelConfig:
    def get(key: str) -> Any:
        return setting(model_type, config_dict, key)

    expect(model_type, config_dict, {"hidden_act": "silu", "attention_bias": False})
    rope = get("rope_parameters") or {}
    check_rope(rope)
    return ModelConfig(
        **common_settings(model_type, config_dict),
        ffn_dim=get("intermediate_size"),
        layers=layer_kinds(model_type, config_dict, {theirs: ours for ours, theirs in LAYER_TYPES.items()}),
        attention=AttentionConfig(
            num_heads=get("num_attention_heads"),
            num_kv_heads=get("num_key_value_heads"),
            head_dim=get("head_dim"),
            rope_theta=float(setting(model_type, rope, "rope_theta")),
            partial_rotary_factor=float(setting(model_type, rope, "partial_rotary_factor")),
        ),
        gated_deltanet=GatedDeltaNetConfig(
            num_k_heads=get("linear_num_key_heads"),
            num_v_heads=get("linear_num_value_heads"),
            head_k_dim=get("linear_key_head_dim"),
            head_v_dim=get("linear_value_head_dim"),
            conv_size=get("linear_conv_kernel_dim"),
        ),
    )


def mappings(config: ModelConfig, projections: Projections) -> list[TensorMapping]:
    begin, end = top_mappings(config, rename)
    for i, kind in enumerate(config.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        begin.append(rename(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight"))
        mixer = of_mixer({"attention": _attention, "gated_deltanet": _gated_deltanet}, kind, "the Hugging Face names")
        begin += mixer(f"{ours}.mixer", theirs, projections)
        begin.append(rename(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"))
        begin += mlp_mappings(f"{ours}.mlp", f"{theirs}.mlp")
    return begin + end


def _attention(ours: str, theirs: str, _projections: Projections) -> list[TensorMapping]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    return [rename(f"{ours}.{name}.weight", f"{theirs}.self_attn.{name}.weight") for name in names]


def _gated_deltanet(ours: str, theirs: str, projections: Projections) -> list[TensorMapping]:
    theirs = f"{theirs}.linear_attn"
    same = ("A_log", "dt_bias", "norm.weight", "out_proj.weight")
    return [
        *projections(ours, theirs),
        conv_mapping(f"{ours}.conv_weight", f"{theirs}.conv1d.weight"),
        *renamed(ours, theirs, {name: name for name in same}),
    ]
