"""The spec of each block's mixer."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint

from sleeptrain.config.mixers import BUILT_IN, GROUP, brought_spec, check_mixer
from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.mixers.spec import MixerSpec


@cache
def spec_class(kind: str) -> type[MixerSpec]:
    """Raises ConfigError for a kind that is unknown, or whose package cannot be imported."""
    check_mixer(kind)
    return EntryPoint(kind, BUILT_IN[kind].spec, GROUP).load() if kind in BUILT_IN else brought_spec(kind)


def mixer_spec(model: ModelConfig, kind: str) -> MixerSpec:
    """Raises ConfigError for an unknown kind."""
    return spec_class(kind)(model, kind)


def block_spec(model: ModelConfig, layer: int) -> MixerSpec:
    """The spec of a block's mixer."""
    return mixer_spec(model, model.layers[layer])


def mixer_specs(model: ModelConfig) -> list[MixerSpec]:
    """The spec of each kind of mixer in the model, once."""
    return [mixer_spec(model, kind) for kind in dict.fromkeys(model.layers)]
