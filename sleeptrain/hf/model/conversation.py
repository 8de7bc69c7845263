"""One call of transformers' `generate()`: what it is asked for, and where its ids go on behind a cache."""

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
    """num_columns: of the ids that `generate` was given. num_read: of them, those that its cache has read before."""

    num_columns: int
    num_read: int


def settled(own: GenerationConfig, given: GenerationConfig | None, more: Mapping[str, Any]) -> GenerationConfig:
    """The settings of one call: `more`, then those `given`, then the model's `own`."""
    settings = GenerationConfig() if given is None else copy.deepcopy(given)
    settings.update(defaults_only=True, **own.to_dict())
    settings.update(**{name: value for name, value in more.items() if hasattr(settings, name)})
    return settings


def begin_turn(
    ids: torch.Tensor | None, mask: torch.Tensor | None, cache: SleepCache | None, use_cache: bool | None
) -> Turn:
    """Before ids are read behind the cache, if there is one. ids None: BOS alone. Raises ConfigError."""
    num_columns = 1 if ids is None else ids.shape[1]
    if cache is None:
        return Turn(num_columns, 0)
    if use_cache is False:
        raise ConfigError("use_cache=False goes with the whole text: leave the cache out")
    # A mask of more columns says that the ids are new ones only.
    repeated = mask is None or mask.shape[1] == num_columns
    cache.begin_turn(num_columns if repeated else None)
    return Turn(num_columns, cache.columns if repeated else 0)
