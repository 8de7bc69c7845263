"""The settings of one call of transformers' `generate()`, and the columns of its ids that a cache has already read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from sleeptrain.errors import ConfigError
from sleeptrain.hf.model.cache import SleepCache


@dataclass(frozen=True)
class Turn:
    """The input of one call of `generate`.

    num_columns: number of columns of its ids.
    num_read: number of these columns that the cache has already read.
    """

    num_columns: int
    num_read: int


def call_settings(
    model_settings: GenerationConfig, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> GenerationConfig:
    """The settings of one call: `arguments` override `generation_config`, which overrides `model_settings`."""
    settings = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    settings.update(defaults_only=True, **model_settings.to_dict())
    settings.update(**{name: value for name, value in arguments.items() if hasattr(settings, name)})
    return settings


def begin_turn(
    ids: torch.Tensor | None, mask: torch.Tensor | None, cache: SleepCache | None, use_cache: bool | None
) -> Turn:
    """Check the ids [B, T] and the mask [B, >= T] against the cache. ids None: one column, BOS. Raises ConfigError."""
    num_columns = 1 if ids is None else ids.shape[1]
    if cache is None:
        return Turn(num_columns, 0)
    if use_cache is False:
        raise ConfigError("use_cache=False goes with the whole text: leave the cache out")
    # A mask with more columns than the ids means that all ids are new.
    repeated = mask is None or mask.shape[1] == num_columns
    cache.begin_turn(num_columns if repeated else None)
    return Turn(num_columns, cache.columns if repeated else 0)
