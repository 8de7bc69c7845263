"""The spec of each block's mixer."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint

from sleeptrain.config.mixers import BUILT_IN, GROUP, brought_spec, check_mixer
from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.mixers.spec import MixerSpec


@cache
def spec_class(kind: str) -> type[MixerSpec]:
    """The spec class of a mixer. Raises ConfigError for an unknown kind or a package that cannot be imported."""
    check_mixer(kind)
    return EntryPoint(kind, BUILT_IN[kind].spec, GROUP).load() if kind in BUILT_IN else brought_spec(kind)


def mixer_spec(model: ModelConfig, kind: str) -> MixerSpec:
    """The spec of a mixer under these settings. Raises ConfigError for an unknown kind."""
    return spec_class(kind)(model, kind)


def block_spec(model: ModelConfig, layer: int) -> MixerSpec:
    """The spec of a block's mixer."""
    return mixer_spec(model, model.layers[layer])


def mixer_specs(model: ModelConfig) -> list[MixerSpec]:
    """The specs of the kinds of mixers in the model, each kind once."""
    return [mixer_spec(model, kind) for kind in dict.fromkeys(model.layers)]
