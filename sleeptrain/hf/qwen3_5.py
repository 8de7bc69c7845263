"""The native model under the names and settings of transformers' dense Qwen3.5 text architecture (`qwen3_5_text`).

Weights map one to one: only names and the shape of the convolution's kernel differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError

MODEL_TYPE = "qwen3_5_text"
_LAYER_TYPES = {"attention": "full_attention", "gated_deltanet": "linear_attention"}

# (pattern of our name, their name); the mixer's own module is called after its kind.
_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "mixer_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
}
_MIXER = {"attention": "self_attn", "gated_deltanet": "linear_attn"}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of `Qwen3_5TextConfig` that describe the same model.

    Raises ConfigError where the architecture has no such model.
    """
    _check_expressible(config)
    attention, delta = config.attention, config.gated_deltanet
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": len(config.layers),
        "layer_types": [_LAYER_TYPES[kind] for kind in config.layers],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": attention.partial_rotary_factor,
            "mrope_section": _mrope_section(attention.head_dim, attention.partial_rotary_factor),
        },
        "linear_num_key_heads": delta.num_k_heads,
        "linear_num_value_heads": delta.num_v_heads,
        "linear_key_head_dim": delta.head_k_dim,
        "linear_value_head_dim": delta.head_v_dim,
        "linear_conv_kernel_dim": delta.conv_size,
    }


def hf_name(name: str, layers: list[str]) -> str:
    """The name in a `qwen3_5_text` state dict of our parameter `name`."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    index, part, rest = match.groups()
    module = _MIXER[layers[int(index)]] if part == "mixer" else _BLOCK[part]
    return f"model.layers.{index}.{module}.{rest.replace('conv_weight', 'conv1d.weight')}"


def to_hf(weights: Mapping[str, torch.Tensor], layers: list[str]) -> dict[str, torch.Tensor]:
    """Our state dict under their names (tensors are shared, not copied)."""
    named = {
        hf_name(name, layers): w.unsqueeze(1) if name.endswith("conv_weight") else w for name, w in weights.items()
    }
    named.setdefault("lm_head.weight", weights["embedding.weight"])
    return named


def from_hf(weights: Mapping[str, torch.Tensor], config: ModelConfig, names: list[str]) -> dict[str, torch.Tensor]:
    """Their state dict under our parameter `names`. Raises KeyError for a tensor that is missing."""
    ours = {}
    for name in names:
        w = weights[hf_name(name, config.layers)]
        ours[name] = w.squeeze(1) if name.endswith("conv_weight") else w
    return ours


def _check_expressible(config: ModelConfig) -> None:
    foreign = sorted(set(config.layers) - set(_LAYER_TYPES))
    if foreign:
        raise ConfigError(f"model.layers holds {', '.join(foreign)}, which {MODEL_TYPE} does not have")
    if not (config.attention.gate and config.attention.qk_norm):
        raise ConfigError(f"{MODEL_TYPE} needs model.attention.gate=true and model.attention.qk_norm=true")


def _mrope_section(head_dim: int, fraction: float) -> list[int]:
    """Three parts of the rotated pairs; for text all positions are equal, so any split gives ordinary RoPE."""
    pairs = int(head_dim * fraction) // 2
    part = pairs // 3
    return [pairs - 2 * part, part, part]
