"""Dense Qwen3.5 text models (`qwen3_5_text`): the architecture of sleeptrain; only the names of tensors differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeptrain.config.schema import ModelConfig
from sleeptrain.hf.families import qwen
from sleeptrain.hf.families.family import Family, TensorMapping, renamed


class Qwen35Text(Family):
    model_type = "qwen3_5_text"
    architecture = "Qwen3_5ForCausalLM"

    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        return qwen.lacks(config)

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        settings = qwen.describe(config)
        attention = config.attention
        settings["rope_parameters"] |= {
            "mrope_section": _mrope_section(attention.head_dim, attention.partial_rotary_factor),
            "mrope_interleaved": True,
        }
        return settings

    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        return qwen.from_config(self.model_type, config_dict)

    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        return qwen.mappings(config, _projections)

    def canonical(self, name: str) -> str | None:
        """Multimodal models use another prefix for the tensors of the text model, and hold other tensors, too."""
        if name.startswith(("model.visual.", "mtp.")):
            return None
        return name.replace("model.language_model.", "model.", 1)


def _projections(ours: str, theirs: str) -> list[TensorMapping]:
    return renamed(
        ours, theirs, {f"in_proj_{part}.weight": f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")}
    )


def _mrope_section(head_dim: int, fraction: float) -> list[int]:
    """Sizes of the three sections of rotated pairs. Text has equal positions in all: any split is plain RoPE."""
    pairs = int(head_dim * fraction) // 2
    part = pairs // 3
    return [pairs - 2 * part, part, part]
