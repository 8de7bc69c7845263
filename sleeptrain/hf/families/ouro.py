"""Ouro (huggingface ByteDance/Ouro-1.4B): a transformer with sandwich norms whose whole stack is looped.

A loop of Ouro is a pass of sleeptrain, with the last norm after each. In Ouro the last loop predicts, or one that a
gate chooses; in sleeptrain the first pass predicts, and there is no gate. An import behaves like Ouro's first loop, and
an export writes `total_ut_steps=1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import AttentionConfig, ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.family import (
    MULTIPLIERS,
    Family,
    TensorMapping,
    common_settings,
    expect,
    foreign_mixers,
    head_dim,
    mlp_mappings,
    norm_mapping,
    other_values,
    own_head_dim,
    setting,
    top_mappings,
)
from sleeptrain.hf.families.jet_nemotron import attention_mappings

_LOOPS = "total_ut_steps"
_NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "input_layernorm_2",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_attention_layernorm_2",
}


class Ouro(Family):
    model_type = "ouro"
    architecture = "OuroForCausalLM"
    in_transformers = False
    options = ("sandwich_norms", "norm_between_passes")

    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        attention = {"gate": False, "qk_norm": "none", "post_norm": False, "scale": 0.0, "partial_rotary_factor": 1.0}
        wanted = {f"attention.{name}": value for name, value in attention.items()}
        wanted |= {"sandwich_norms": True, "norm_between_passes": True} | dict.fromkeys(MULTIPLIERS, 1.0)
        return foreign_mixers(config, ("attention",)) | other_values(config, wanted)

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        attention = config.attention
        return {
            "layer_types": ["full_attention"] * len(config.layers),
            "rope_theta": attention.rope_theta,
            "rope_scaling": None,
            _LOOPS: 1,
            "early_exit_threshold": 1.0,
        } | own_head_dim(config)

    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        def get(key: str) -> Any:
            return setting(self.model_type, config_dict, key)

        expect(self.model_type, config_dict, {"hidden_act": "silu"})
        types = set(config_dict.get("layer_types") or ["full_attention"])
        if types != {"full_attention"} or config_dict.get("rope_scaling"):
            raise ConfigError(
                f"config.json: layer_types {sorted(types)} and rope_scaling {config_dict.get('rope_scaling')} are not "
                "supported for ouro, only full_attention and none"
            )
        return ModelConfig(
            **common_settings(self.model_type, config_dict),
            ffn_dim=get("intermediate_size"),
            layers=["attention"] * get("num_hidden_layers"),
            norm="plain",
            sandwich_norms=True,
            norm_between_passes=True,
            attention=AttentionConfig(
                num_heads=get("num_attention_heads"),
                num_kv_heads=get("num_key_value_heads"),
                head_dim=head_dim(self.model_type, config_dict),
                rope_theta=float(get("rope_theta")),
                partial_rotary_factor=1.0,
                gate=False,
                qk_norm="none",
            ),
        )

    def remarks(self, config_dict: Mapping[str, Any]) -> list[str]:
        loops = config_dict.get(_LOOPS, 1)
        if loops == 1:
            return []
        return [
            f"{_LOOPS}={loops}: in Ouro the last of {loops} loops predicts, in sleeptrain the first pass; "
            "the model begins with the loss of one loop (N=1)",
            "without a recurrent layer passes are lost: give it a memory with run.init_inserted",
        ]

    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        norm = norm_mapping(config.norm)
        begin, end = top_mappings(config, norm)
        for i, kind in enumerate(config.layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            begin += [norm(f"{ours}.{a}.weight", f"{theirs}.{b}.weight") for a, b in _NORMS.items()]
            mixer = of_mixer({"attention": attention_mappings}, kind, "the Hugging Face names")
            begin += mixer(config, f"{ours}.mixer", f"{theirs}.self_attn")
            begin += mlp_mappings(f"{ours}.mlp", f"{theirs}.mlp")
        return [*begin, *end, _gate(config.dim)]


def _gate(dim: int) -> TensorMapping:
    """Zeros for the gate, which has no parameter in sleeptrain. With one loop the gate has no effect."""
    names = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")
    return TensorMapping((), names, lambda: (torch.zeros(1, dim), torch.zeros(1)), lambda *_: ())
