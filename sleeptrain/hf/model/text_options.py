"""What `generate()` is told of a tokenizer by those who make text of ids."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sleeptrain.data.tokenizer import Tokenizer


def text_options(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `generate`: which ids end a text, what rows that have ended are given, which ids are never drawn."""
    return {
        "eos_token_id": end_ids(model, tokenizer),
        "pad_token_id": tokenizer.eos_id,
        "logits_processor": LogitsProcessorList([OnlyText(tokenizer.vocab_size)]),
    }


def end_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's EOS, and all that `generation_config.json` (or else `config.json`) names besides."""
    named = model.generation_config.eos_token_id
    if named is None:
        named = getattr(model.config, "eos_token_id", None)
    return sorted({tokenizer.eos_id, *_listed(named)})


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class OnlyText(LogitsProcessor):
    """Ids that the tokenizer does not have are never drawn: a model may have more, up to a round number."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        outside = torch.arange(scores.shape[-1], device=scores.device) >= self._vocab_size
        return scores.masked_fill(outside, -torch.inf)
