"""Dense Granite 4 hybrids (`granitemoehybrid` without experts): Mamba-2 and plain attention, with multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import AttentionConfig, Mamba2Config, ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.family import (
    Family,
    TensorMapping,
    check_rope,
    common_settings,
    conv_mapping,
    expect,
    foreign_mixers,
    head_dim,
    layer_kinds,
    norm_mapping,
    other_values,
    own_head_dim,
    rename,
    renamed,
    setting,
    top_mappings,
)

# The names in files on the hub. transformers replaces them by names that its hybrids share; KINDS reads both.
LAYER_TYPES = {"attention": "attention", "mamba2": "mamba"}
KINDS = {"attention": "attention", "mamba": "mamba2", "full_attention": "attention", "linear_attention": "mamba2"}


class GraniteMoeHybrid(Family):
    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"

    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        lacking, attention, mamba = foreign_mixers(config, tuple(LAYER_TYPES)), config.attention, config.mamba2
        if "attention" in config.layers:
            wanted = {"attention.gate": False, "attention.qk_norm": "none", "attention.post_norm": False}
            lacking |= other_values(config, wanted)
            if attention.partial_rotary_factor not in (0, 1):
                name = f"model.attention.partial_rotary_factor={attention.partial_rotary_factor}"
                lacking[name] = "it has 0, no positions, and 1"
        if "mamba2" in config.layers:
            lacking |= other_values(config, {"mamba2.num_groups": 1})
            if mamba.num_heads * mamba.head_dim % config.dim:
                name = f"model.mamba2.num_heads={mamba.num_heads} of head_dim={mamba.head_dim}"
                lacking[name] = f"together they are a multiple of model.dim={config.dim}"
        return lacking

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        attention, mamba = config.attention, config.mamba2
        rotates = "attention" in config.layers and attention.partial_rotary_factor == 1
        heads, width = (mamba.num_heads, mamba.head_dim) if "mamba2" in config.layers else (1, config.dim)
        return {
            "shared_intermediate_size": config.ffn_dim,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": [LAYER_TYPES[kind] for kind in config.layers],
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logits_divisor,
            "attention_multiplier": attention.scale or attention.head_dim**-0.5,
            "attention_bias": False,
            "position_embedding_type": "rope" if rotates else None,
            "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
            "mamba_n_heads": heads,
            "mamba_d_head": width,
            "mamba_expand": heads * width // config.dim,
            "mamba_d_state": mamba.state_dim,
            "mamba_n_groups": mamba.num_groups,
            "mamba_d_conv": mamba.conv_size,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
        } | own_head_dim(config)

    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        def get(key: str) -> Any:
            return setting(self.model_type, config_dict, key)

        wanted = {"hidden_act": "silu", "attention_bias": False, "num_local_experts": 0}
        expect(self.model_type, config_dict, wanted | {"mamba_conv_bias": True, "mamba_proj_bias": False})
        layers = layer_kinds(self.model_type, config_dict, KINDS)
        if "mamba2" in layers:
            expect(self.model_type, config_dict, {"mamba_n_groups": 1})
        if tuple(config_dict.get("time_step_limit") or (0.0, math.inf)) != (0.0, math.inf):
            raise ConfigError(
                f"config.json: time_step_limit={config_dict['time_step_limit']} is not supported, only none"
            )
        return ModelConfig(
            **common_settings(self.model_type, config_dict),
            ffn_dim=get("shared_intermediate_size"),
            layers=layers,
            norm="plain",
            embedding_multiplier=float(get("embedding_multiplier")),
            residual_multiplier=float(get("residual_multiplier")),
            logits_divisor=float(get("logits_scaling")),
            attention=self._attention(config_dict),
            mamba2=Mamba2Config(
                num_heads=get("mamba_n_heads"),
                head_dim=get("mamba_d_head"),
                state_dim=get("mamba_d_state"),
                num_groups=get("mamba_n_groups"),
                conv_size=get("mamba_d_conv"),
            ),
        )

    def _attention(self, config_dict: Mapping[str, Any]) -> AttentionConfig:
        def get(key: str) -> Any:
            return setting(self.model_type, config_dict, key)

        rotates, width, scale = get("position_embedding_type") == "rope", head_dim(self.model_type, config_dict), 0.0
        if get("attention_multiplier") != width**-0.5:
            scale = float(get("attention_multiplier"))
        rope = config_dict.get("rope_parameters") or {}
        if rotates:
            check_rope(rope)
        return AttentionConfig(
            num_heads=get("num_attention_heads"),
            num_kv_heads=get("num_key_value_heads"),
            head_dim=width,
            rope_theta=float(rope.get("rope_theta") or AttentionConfig.rope_theta),
            partial_rotary_factor=1.0 if rotates else 0.0,
            gate=False,
            qk_norm="none",
            scale=scale,
        )

    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        norm = norm_mapping(config.norm)
        begin, end = top_mappings(config, norm)
        for i, kind in enumerate(config.layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            begin.append(norm(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight"))
            mixer = of_mixer({"attention": _attention, "mamba2": _mamba}, kind, "the Hugging Face names")
            begin += mixer(f"{ours}.mixer", theirs)
            begin.append(norm(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"))
            begin += _mlp(f"{ours}.mlp", f"{theirs}.shared_mlp")
        return begin + end


def _attention(ours: str, theirs: str) -> list[TensorMapping]:
    return renamed(ours, f"{theirs}.self_attn", {f"{n}_proj.weight": f"{n}_proj.weight" for n in "qkvo"})


def _mamba(ours: str, theirs: str) -> list[TensorMapping]:
    theirs = f"{theirs}.mamba"
    same = ("in_proj.weight", "A_log", "dt_bias", "D", "norm.weight", "out_proj.weight")
    return [
        *renamed(ours, theirs, {name: name for name in same} | {"conv_bias": "conv1d.bias"}),
        conv_mapping(f"{ours}.conv_weight", f"{theirs}.conv1d.weight"),
    ]


def _mlp(ours: str, theirs: str) -> list[TensorMapping]:
    both = (f"{ours}.gate_proj.weight", f"{ours}.up_proj.weight")
    return [
        TensorMapping(
            both, (f"{theirs}.input_linear.weight",), lambda g, u: (torch.cat([g, u]),), lambda w: w.chunk(2)
        ),
        rename(f"{ours}.down_proj.weight", f"{theirs}.output_linear.weight"),
    ]
