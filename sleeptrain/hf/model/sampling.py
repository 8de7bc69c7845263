"""Greedy decoding and sampling, token by token, for `generate()` of transformers.

`generate()` takes the loop as its public argument `custom_generate`. transformers' own loop does not mark the pads of
rows that have ended, and a sleeping model must not read pads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from sleeptrain.hf.model.cache import CACHE_NAME


def sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Callable[..., Any],
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """The ids [B, T] followed by the new ones, and the outputs that `generation_config` requests.

    A row ends when a stopping criterion is met. If one of the criteria is an EOS, ended rows get pads until the last
    row ends; without an EOS they continue. A cache for new text only has read the complete answer at the end.
    """
    record, pad = _Record(generation_config), _pad_id(generation_config, stopping_criteria)
    mask_BT = model_kwargs.pop("attention_mask", None)
    mask_BT = torch.ones_like(input_ids) if mask_BT is None else mask_BT
    going_B = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    step = None  # number of columns that the model reads next; None: all that it has not read
    while going_B.any():
        inputs = model.prepare_inputs_for_generation(
            input_ids, step, attention_mask=mask_BT, is_first_iteration=record.num_steps == 0, **model_kwargs
        )
        logits_BV = model(**inputs, return_dict=True).logits[:, -1].to(input_ids.device, torch.float32, copy=True)
        scores_BV = logits_processor(input_ids, logits_BV)
        record.add(scores_BV, logits_BV)
        next_B = _next_ids(scores_BV, bool(generation_config.do_sample))
        is_text_B = torch.ones_like(going_B) if pad is None else going_B
        next_B = next_B.where(is_text_B, torch.zeros_like(next_B) if pad is None else pad)
        input_ids = torch.cat([input_ids, next_B[:, None]], dim=1)
        mask_BT = torch.cat([mask_BT, is_text_B[:, None].to(mask_BT)], dim=1)
        going_B = going_B & ~stopping_criteria(input_ids, record.scores)
        if streamer is not None:
            streamer.put(next_B.cpu())
        step = 1 if model_kwargs.get("use_cache") else None
    if streamer is not None:
        streamer.end()
    cache = model_kwargs.get(CACHE_NAME)
    if cache is not None and cache.new_text:  # later calls do not repeat the last token
        sleep = {name: model_kwargs.get(name) for name in ("passes", "window")}
        model.read(input_ids[:, -1:], mask_BT[:, -1:], cache, **sleep)
    return record.output(input_ids, cache)


def _next_ids(scores_BV: torch.Tensor, do_sample: bool) -> torch.Tensor:
    if do_sample:
        return torch.multinomial(scores_BV.softmax(-1), 1).squeeze(1)
    return scores_BV.argmax(-1)


def _pad_id(settings: GenerationConfig, criteria: StoppingCriteriaList) -> torch.Tensor | None:
    """The pad of rows that have ended, int64 []; None if no id ends a text."""
    ends = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
    if not ends:
        return None
    first = torch.as_tensor(ends[0]).flatten()[0]
    return first if settings.pad_token_id is None else torch.tensor(settings.pad_token_id, device=first.device)


class _Record:
    """The outputs of `generate()` besides the ids, if the settings request them."""

    def __init__(self, settings: GenerationConfig) -> None:
        self._returns_dict = bool(settings.return_dict_in_generate)
        self.scores: tuple[torch.Tensor, ...] | None = () if self._returns_dict and settings.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if self._returns_dict and settings.output_logits else None
        self.num_steps = 0

    def add(self, scores_BV: torch.Tensor, logits_BV: torch.Tensor) -> None:
        self.num_steps += 1
        if self.scores is not None:
            self.scores = (*self.scores, scores_BV)
        if self.logits is not None:
            self.logits = (*self.logits, logits_BV)

    def output(self, ids: torch.Tensor, cache: Any) -> torch.Tensor | GenerateDecoderOnlyOutput:
        if not self._returns_dict:
            return ids
        outputs: dict[str, Any] = {"sequences": ids, "scores": self.scores, "logits": self.logits, CACHE_NAME: cache}
        return GenerateDecoderOnlyOutput(**outputs)
