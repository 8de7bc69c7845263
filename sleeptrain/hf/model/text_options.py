"""Arguments of `generate()` that follow from a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sleeptrain.data.tokenizer import Tokenizer


def text_options(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `generate`: ids that end a text, the pad of ended rows, and a filter of ids without text."""
    return {
        "eos_token_id": end_ids(model, tokenizer),
        "pad_token_id": tokenizer.eos_id,
        "logits_processor": LogitsProcessorList([OnlyText(tokenizer.vocab_size)]),
    }


def end_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's EOS, and the EOS ids of `generation_config.json`, or of `config.json` if it has none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    return sorted({tokenizer.eos_id, *_as_list(eos)})


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class OnlyText(LogitsProcessor):
    """Excludes ids that the tokenizer does not have: the vocabulary of a model may be rounded up."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        outside = torch.arange(scores.shape[-1], device=scores.device) >= self._vocab_size
        return scores.masked_fill(outside, -torch.inf)
