"""OLMo hybrids (`olmo_hybrid`): norms before Gated DeltaNet and after attention, q/k norms over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.hf.families.family import (
    MULTIPLIERS,
    Family,
    TensorMapping,
    check_rope,
    common_settings,
    expect,
    foreign_mixers,
    head_dim,
    layer_kinds,
    mlp_mappings,
    norm_mapping,
    other_values,
    own_head_dim,
    rename,
    renamed,
    setting,
    top_mappings,
)

LAYER_TYPES = {"attention": "full_attention", "gated_deltanet": "linear_attention"}
# Their names of the norms of (mixer, feed-forward).
_NORMS = {
    "attention": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gated_deltanet": ("attention_layer_norm", "feedforward_layer_norm"),
}
GATED_NORM_EPS = 1e-5  # fixed in the architecture


class OlmoHybrid(Family):
    model_type = "olmo_hybrid"
    architecture = "OlmoHybridForCausalLM"

    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        lacking, attention, delta = foreign_mixers(config, tuple(LAYER_TYPES)), config.attention, config.gated_deltanet
        lacking |= {f"model.layers without {kind}": "it has both" for kind in LAYER_TYPES if kind not in config.layers}
        lacking |= other_values(config, dict.fromkeys(MULTIPLIERS, 1.0))
        if "attention" in config.layers:
            wanted = {"gate": False, "qk_norm": "all", "post_norm": True, "scale": 0.0}
            lacking |= other_values(config, {f"attention.{name}": value for name, value in wanted.items()})
            if attention.partial_rotary_factor not in (0, 1):
                name = f"model.attention.partial_rotary_factor={attention.partial_rotary_factor}"
                lacking[name] = "it has 0, no positions, and 1"
        if "gated_deltanet" in config.layers and (delta.norm_eps or config.norm_eps) != GATED_NORM_EPS:
            lacking[f"model.gated_deltanet.norm_eps={delta.norm_eps}"] = f"it has {GATED_NORM_EPS}"
        return lacking

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        attention, delta = config.attention, config.gated_deltanet
        # In this architecture a rope_theta of None means no positions.
        rope = {"rope_type": "default", "rope_theta": attention.rope_theta if attention.partial_rotary_factor else None}
        return {
            "layer_types": [LAYER_TYPES[kind] for kind in config.layers],
            "attention_bias": False,
            "rope_parameters": rope,
            "linear_num_key_heads": delta.num_k_heads,
            "linear_num_value_heads": delta.num_v_heads,
            "linear_key_head_dim": delta.head_k_dim,
            "linear_value_head_dim": delta.head_v_dim,
            "linear_conv_kernel_dim": delta.conv_size,
            "linear_allow_neg_eigval": delta.allow_neg_eigval,
        } | own_head_dim(config)

    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        def get(key: str) -> Any:
            return setting(self.model_type, config_dict, key)

        expect(self.model_type, config_dict, {"hidden_act": "silu", "attention_bias": False})
        rope = config_dict.get("rope_parameters") or {}
        check_rope(rope)
        theta = rope.get("rope_theta")
        return ModelConfig(
            **common_settings(self.model_type, config_dict),
            ffn_dim=get("intermediate_size"),
            layers=layer_kinds(self.model_type, config_dict, {theirs: ours for ours, theirs in LAYER_TYPES.items()}),
            norm="plain",
            attention=AttentionConfig(
                num_heads=get("num_attention_heads"),
                num_kv_heads=get("num_key_value_heads"),
                head_dim=head_dim(self.model_type, config_dict),
                rope_theta=AttentionConfig.rope_theta if theta is None else float(theta),
                partial_rotary_factor=0.0 if theta is None else 1.0,
                gate=False,
                qk_norm="all",
                post_norm=True,
            ),
            gated_deltanet=GatedDeltaNetConfig(
                num_k_heads=get("linear_num_key_heads"),
                num_v_heads=get("linear_num_value_heads"),
                head_k_dim=get("linear_key_head_dim"),
                head_v_dim=get("linear_value_head_dim"),
                conv_size=get("linear_conv_kernel_dim"),
                allow_neg_eigval=get("linear_allow_neg_eigval"),
                norm_eps=GATED_NORM_EPS,
            ),
        )

    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        """Uses the names in files on the hub; transformers renames the tensors when it reads them."""
        norm, delta = norm_mapping(config.norm), config.gated_deltanet
        keys = delta.num_k_heads * delta.head_k_dim
        sizes = [keys, keys, delta.num_v_heads * delta.head_v_dim]
        begin, end = top_mappings(config, norm)
        for i, kind in enumerate(config.layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            mixer_norm, mlp_norm = of_mixer(_NORMS, kind, "the Hugging Face names")
            if kind == "attention":
                begin += renamed(
                    f"{ours}.mixer", f"{theirs}.self_attn", {f"{n}_proj.weight": f"{n}_proj.weight" for n in "qkvo"}
                )
                begin += [norm(f"{ours}.mixer.{n}_norm.weight", f"{theirs}.self_attn.{n}_norm.weight") for n in "qk"]
            else:
                begin += _gated_deltanet(f"{ours}.mixer", f"{theirs}.linear_attn", sizes)
            begin.append(norm(f"{ours}.mixer_norm.weight", f"{theirs}.{mixer_norm}.weight"))
            begin.append(norm(f"{ours}.mlp_norm.weight", f"{theirs}.{mlp_norm}.weight"))
            begin += mlp_mappings(f"{ours}.mlp", f"{theirs}.mlp")
        return begin + end


def _gated_deltanet(ours: str, theirs: str, sizes: list[int]) -> list[TensorMapping]:
    """Mappings of a Gated DeltaNet mixer. sizes: numbers of channels of q, k and v."""
    names = {
        "in_proj_z": "g_proj",
        "in_proj_b": "b_proj",
        "in_proj_a": "a_proj",
        "out_proj": "o_proj",
        "norm": "o_norm",
    }
    return [
        TensorMapping(
            (f"{ours}.in_proj_qkv.weight",),
            tuple(f"{theirs}.{part}_proj.weight" for part in "qkv"),
            lambda w: w.split(sizes),
            lambda *parts: (torch.cat(parts),),
        ),
        TensorMapping(
            (f"{ours}.conv_weight",),
            tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv"),
            lambda w: w.unsqueeze(1).split(sizes),
            lambda *parts: (torch.cat(parts).squeeze(1),),
        ),
        *renamed(ours, theirs, {f"{a}.weight": f"{b}.weight" for a, b in names.items()}),
        rename(f"{ours}.A_log", f"{theirs}.A_log"),
        rename(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
    ]
