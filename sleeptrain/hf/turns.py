"""One call of transformers' `generate()`: whether a cache can go on with the given ids, and which rows have ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from sleeptrain.errors import ConfigError
from sleeptrain.hf.cache import SleepCache


def begin_turn(input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    """Before the prompt is read behind the cache in `model_kwargs`, if there is one. Raises ConfigError."""
    if config.prefill_chunk_size is not None:
        raise ConfigError("prefill_chunk_size: a prompt is read window by window; leave it out")
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, SleepCache):
        return
    if not config.use_cache:
        raise ConfigError("use_cache=False goes with the whole text: leave past_key_values out")
    mask = model_kwargs.get("attention_mask")
    # A mask of more columns tells transformers that the ids are new ones only.
    repeated = mask is None or mask.shape[1] == input_ids.shape[1]
    cache.begin_turn(input_ids.shape[1] if repeated else None)


class Ended(StoppingCriteriaList):
    """Criteria that remember which rows they have ended, where an ended row is given pads (an id ends a text).

    rows_B, before_last_B: bool, with the last token and without. last_B: the last token of each row, int64.
    """

    def __init__(self, criteria: StoppingCriteriaList, input_ids: torch.Tensor) -> None:
        super().__init__(criteria)
        self.last_B = input_ids[:, -1]
        self.rows_B = self.before_last_B = torch.zeros_like(self.last_B, dtype=torch.bool)
        self._gives_pads = any(hasattr(each, "eos_token_id") for each in criteria)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done_B = super().__call__(input_ids, scores, **kwargs)
        self.last_B, self.before_last_B = input_ids[:, -1], self.rows_B
        if self._gives_pads:
            self.rows_B = self.rows_B | done_B
        return done_B
