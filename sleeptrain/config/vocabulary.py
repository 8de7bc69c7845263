"""The vocabulary that a model takes from its data where its settings name none."""

from __future__ import annotations

from dataclasses import replace

from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """The configuration with the vocabulary size of its data, unless `model.vocab_size` is set.

    Raises ConfigError if the setting is smaller than the data's.
    """
    if config.model.vocab_size == 0:
        return replace(config, model=replace(config.model, vocab_size=vocab_size))
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the data's {vocab_size}; "
            "leave it 0 to take the data's"
        )
    return config
