"""The families of transformers' models: maps of names and settings, one module for each family."""

from __future__ import annotations

from sleeptrain.config.schema import ModelConfig
from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families.family import Family, Read, TensorMapping, stays_wide
from sleeptrain.hf.families.granitemoehybrid import GraniteMoeHybrid
from sleeptrain.hf.families.jet_nemotron import JetNemotron
from sleeptrain.hf.families.olmo_hybrid import OlmoHybrid
from sleeptrain.hf.families.ouro import Ouro
from sleeptrain.hf.families.qwen3_5_text import Qwen35Text
from sleeptrain.hf.families.qwen3_next import Qwen3Next

# An export without --to takes the first family that fits.
_ALL: tuple[Family, ...] = (Qwen35Text(), GraniteMoeHybrid(), OlmoHybrid(), Qwen3Next(), JetNemotron(), Ouro())
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_of(model_type: str) -> Family:
    """The family of a `model_type` of `config.json`. Raises ConfigError: sleeptrain has no such family."""
    if model_type not in FAMILIES:
        raise ConfigError(f"unknown model_type '{model_type}'; {suggest(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def expressing(config: ModelConfig) -> list[Family]:
    """The families that can express the model, in the order of FAMILIES."""
    return [family for family in FAMILIES.values() if not family.lacks(config)]


__all__ = ["FAMILIES", "Family", "Read", "TensorMapping", "expressing", "family_of", "stays_wide"]
