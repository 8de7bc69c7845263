"""Jet-Nemotron (github NVlabs/Jet-Nemotron): JetBlock mixers and Qwen2's attention, sliding in some layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import AttentionConfig, JetConfig, ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.family import (
    MULTIPLIERS,
    Family,
    TensorMapping,
    common_settings,
    expect,
    foreign_mixers,
    head_dim,
    layer_kinds,
    mlp_mappings,
    norm_mapping,
    other_values,
    own_head_dim,
    renamed,
    setting,
    top_mappings,
)

LAYER_TYPES = {"attention": "attn", "sliding_attention": "swa", "jet": "jet"}
_JET = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "in_proj_a.weight": "a_proj.weight",
    "in_proj_b.weight": "b_proj.weight",
    "in_proj_z.weight": "g_proj.weight",
    "out_proj.weight": "o_proj.weight",
    "norm.weight": "o_norm.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "kernel_in.weight": "dynamic_conv1d.kernel_generator.w1.weight",
}


class JetNemotron(Family):
    model_type = "jet_nemotron"
    architecture = "JetNemotronForCausalLM"
    in_transformers = False
    options = ("attention.qkv_bias",)

    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        lacking = foreign_mixers(config, tuple(LAYER_TYPES)) | other_values(config, dict.fromkeys(MULTIPLIERS, 1.0))
        if {"attention", "sliding_attention"} & set(config.layers):
            wanted = {"gate": False, "qk_norm": "none", "qkv_bias": True, "post_norm": False, "scale": 0.0}
            wanted |= {"partial_rotary_factor": 1.0}
            lacking |= other_values(config, {f"attention.{name}": value for name, value in wanted.items()})
        values = config.jet.num_heads * config.jet.head_v_dim
        if "jet" in config.layers and values // max(values // config.jet.kernel_dim, 1) != config.jet.kernel_dim:
            lacking[f"model.jet.kernel_dim={config.jet.kernel_dim}"] = f"it must be {values} divided by a whole number"
        return lacking

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        attention, jet = config.attention, config.jet
        return {
            "layer_types": [LAYER_TYPES[kind] for kind in config.layers],
            "rope_theta": attention.rope_theta,
            "rope_scaling": None,
            "efficient_attention_config": {
                "swa": {"window_size": attention.sliding_window},
                "jet": {
                    "num_heads": jet.num_heads,
                    "head_dim": jet.head_k_dim,
                    "expand_v": _expansion(jet.head_k_dim, jet.head_v_dim),
                    "conv_size": jet.conv_size,
                    "dconv_generator_reduction": max(jet.num_heads * jet.head_v_dim // jet.kernel_dim, 1),
                    "norm_eps": jet.norm_eps,
                },
            },
        } | own_head_dim(config)

    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        def get(key: str) -> Any:
            return setting(self.model_type, config_dict, key)

        expect(self.model_type, config_dict, {"hidden_act": "silu", "rope_scaling": None})
        layers = layer_kinds(self.model_type, config_dict, {theirs: ours for ours, theirs in LAYER_TYPES.items()})
        efficient = get("efficient_attention_config")
        sliding = efficient.get("swa", {"window_size": AttentionConfig.sliding_window})
        return ModelConfig(
            **common_settings(self.model_type, config_dict),
            ffn_dim=get("intermediate_size"),
            layers=layers,
            norm="plain",
            attention=AttentionConfig(
                num_heads=get("num_attention_heads"),
                num_kv_heads=get("num_key_value_heads"),
                head_dim=head_dim(self.model_type, config_dict),
                rope_theta=float(get("rope_theta")),
                partial_rotary_factor=1.0,
                gate=False,
                qk_norm="none",
                qkv_bias=True,
                sliding_window=sliding["window_size"],
            ),
            jet=_jet_config(self.model_type, setting(self.model_type, efficient, "jet"))
            if "jet" in layers
            else JetConfig(),
        )

    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        norm = norm_mapping(config.norm)
        begin, end = top_mappings(config, norm)
        for i, kind in enumerate(config.layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            begin.append(norm(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight"))
            mixers = {"attention": attention_mappings, "sliding_attention": attention_mappings, "jet": _jet_mappings}
            mixer = of_mixer(mixers, kind, "the Hugging Face names")
            begin += mixer(config, f"{ours}.mixer", f"{theirs}.self_attn")
            begin.append(norm(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"))
            begin += mlp_mappings(f"{ours}.mlp", f"{theirs}.mlp")
        return begin + end


def attention_mappings(config: ModelConfig, ours: str, theirs: str) -> list[TensorMapping]:
    biased = ("q_proj", "k_proj", "v_proj") if config.attention.qkv_bias else ()
    names = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")] + [f"{n}.bias" for n in biased]
    return renamed(ours, theirs, {name: name for name in names})


def _jet_mappings(config: ModelConfig, ours: str, theirs: str) -> list[TensorMapping]:
    """Rows of the kernel generator's matrix and bias: their order is [channel, tap], ours is [tap, channel]."""
    jet = config.jet

    def by_channel(rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (rows.unflatten(0, (jet.conv_size, -1)).transpose(0, 1).flatten(0, 1),)

    def by_tap(rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (rows.unflatten(0, (-1, jet.conv_size)).transpose(0, 1).flatten(0, 1),)

    kernels = f"{theirs}.dynamic_conv1d.kernel_generator.w2"
    return renamed(ours, theirs, _JET) + [
        TensorMapping((f"{ours}.kernel_out.{part}",), (f"{kernels}.{part}",), by_channel, by_tap)
        for part in ("weight", "bias")
    ]


def _jet_config(model_type: str, config_dict: Mapping[str, Any]) -> JetConfig:
    def get(key: str) -> Any:
        return setting(model_type, config_dict, key)

    heads, width, expansion = get("num_heads"), get("head_dim"), float(get("expand_v"))
    values = int(width * expansion)
    if not math.isclose(width * expansion, values, rel_tol=1e-5):
        raise ConfigError(f"config.json: expand_v={expansion} of head_dim={width} is not a whole number of dimensions")
    return JetConfig(
        num_heads=heads,
        head_k_dim=width,
        head_v_dim=values,
        conv_size=get("conv_size"),
        kernel_dim=heads * values // get("dconv_generator_reduction"),
        norm_eps=float(get("norm_eps")),  # a string in the published files
    )


def _expansion(keys: int, values: int) -> float:
    """A float `expand_v` for which int(keys * expand_v) == values. keys, values: widths of a head."""
    factor = values / keys
    return factor if int(keys * factor) == values else math.nextafter(factor, math.inf)
