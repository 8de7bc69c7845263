"""Dense Qwen3-Next models (`qwen3_next` without experts): Qwen3.5 with projections joined by key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sleeptrain.config.schema import GatedDeltaNetConfig, ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import qwen
from sleeptrain.hf.families.family import Family, TensorMapping, Tensors, setting


class Qwen3Next(Family):
    model_type = "qwen3_next"
    architecture = "Qwen3NextForCausalLM"

    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        return qwen.lacks(config)

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        dense = {"num_experts": 0, "mlp_only_layers": list(range(len(config.layers))), "decoder_sparse_step": 1}
        return qwen.describe(config) | dense

    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        config = qwen.from_config(self.model_type, config_dict)
        dense = set(setting(self.model_type, config_dict, "mlp_only_layers") or ())
        if setting(self.model_type, config_dict, "num_experts") and not dense.issuperset(range(len(config.layers))):
            raise ConfigError(
                "config.json: num_experts is not 0: sleeptrain has no mixture of experts, only dense models"
            )
        return config

    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        delta = config.gated_deltanet
        return qwen.mappings(config, lambda ours, theirs: _projections(ours, theirs, delta))


def _projections(ours: str, theirs: str, delta: GatedDeltaNetConfig) -> list[TensorMapping]:
    """Their rows for each key head: [q | k | v | z] and [b | a], where v, z, b and a are those of its value heads."""
    heads, K = delta.num_k_heads, delta.head_k_dim
    shared = delta.num_v_heads // heads
    values = shared * delta.head_v_dim
    keys = heads * K

    def join(qkv: torch.Tensor, z: torch.Tensor) -> Tensors:
        return (_by_head(heads, *qkv.split([keys, keys, heads * values]), z),)

    def split(qkvz: torch.Tensor) -> Tensors:
        q, k, v, z = _from_head(heads, qkvz, [K, K, values, values])
        return torch.cat([q, k, v]), z

    return [
        TensorMapping(
            (f"{ours}.in_proj_qkv.weight", f"{ours}.in_proj_z.weight"), (f"{theirs}.in_proj_qkvz.weight",), join, split
        ),
        TensorMapping(
            (f"{ours}.in_proj_b.weight", f"{ours}.in_proj_a.weight"),
            (f"{theirs}.in_proj_ba.weight",),
            lambda b, a: (_by_head(heads, b, a),),
            lambda ba: _from_head(heads, ba, [shared, shared]),
        ),
    ]


def _by_head(heads: int, *parts: torch.Tensor) -> torch.Tensor:
    """Join matrices whose rows are sorted by head: the result holds, head by head, the rows of all parts."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def _from_head(heads: int, joined: torch.Tensor, sizes: list[int]) -> Tensors:
    """The inverse of `_by_head`. sizes: number of rows of each part in a head."""
    return tuple(part.flatten(0, 1) for part in joined.unflatten(0, (heads, -1)).split(sizes, dim=1))
