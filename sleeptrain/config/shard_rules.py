"""Checks of the sources of shards and of their mixture."""

from __future__ import annotations

import math

from sleeptrain.config.schema import ShardsConfig, ShardSource
from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError


def check_sources(sources: list[ShardSource]) -> None:
    """Raises ConfigError unless each source has a name of its own and training shards, and one has held-out shards."""
    if not sources:
        raise ConfigError(
            "data.shards.sources must list at least one source for data.source=shards: write data=stdlib, or "
            "'data.shards.sources=[{train: FOLDER, validation: FOLDER}]'"
        )
    names = [source.name for source in sources]
    for index, source in enumerate(sources):
        if not source.name or names.index(source.name) < index:
            raise ConfigError(
                f"data.shards.sources[{index}].name must be one that no other source has: '{source.name}'"
            )
        if not source.train:
            raise ConfigError(f"data.shards.sources[{index}].train must be set: name the folder of its shards")
    if not any(source.validation for source in sources):
        raise ConfigError(
            "data.shards.sources[0].validation must be set: at least one source needs held-out shards to evaluate on"
        )


def check_mixture(shards: ShardsConfig) -> None:
    """Raises ConfigError for weights that are no shares, unsorted stages, or a stage with an unknown source."""
    names = [source.name for source in shards.sources]
    weights = [(f"data.shards.sources[{index}].weight", source.weight) for index, source in enumerate(shards.sources)]
    _check_weights("data.shards.sources", weights)
    before = 0
    for index, stage in enumerate(shards.curriculum):
        name = f"data.shards.curriculum[{index}]"
        if stage.tokens <= before:
            raise ConfigError(
                f"{name}.tokens ({stage.tokens}) must be greater than {before}: sort the stages; what holds from the "
                "first token on are the sources' own weights"
            )
        before = stage.tokens
        for source in stage.weights:
            if source not in names:
                raise ConfigError(f"{name}.weights: unknown source '{source}'; {suggest(source, names)}")
        _check_weights(f"{name}.weights", [(f"{name}.weights.{key}", weight) for key, weight in stage.weights.items()])


def _check_weights(name: str, weights: list[tuple[str, float]]) -> None:
    for setting, weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{setting} must be a finite number and at least 0, not {weight}")
    if not any(weight for _, weight in weights):
        raise ConfigError(f"{name}: at least one weight must be greater than 0")
