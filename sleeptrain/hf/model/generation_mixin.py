"""`generate()` of a sleeping model: that of transformers, with a `SleepCache`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode, StopStringCriteria

from sleeptrain.hf.model.cache import CACHE_NAME, SleepCache, one_cache
from sleeptrain.hf.model.conversation import Turn, begin_turn, call_settings
from sleeptrain.hf.model.offered import refuse_settings
from sleeptrain.hf.model.sampling import sample

_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class SleepGeneration(GenerationMixin):
    """The public methods of `GenerationMixin` that `SleepForCausalLM` overrides."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *,
        past_key_values: SleepCache | None = None,
        cache: SleepCache | None = None,
        custom_generate: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **arguments: Any,
    ) -> Any:
        """`generate` of transformers, with the extra arguments `passes` and `window`. See docs/generation.md.

        past_key_values, cache: two names of the cache. tokenizer: finds `stop_strings`. Raises ConfigError: the cache
        does not fit, or an argument is refused.
        """
        model: Any = self
        parent: Any = super()
        settings = call_settings(model.generation_config, generation_config, arguments)
        refuse_settings(settings, arguments | {"custom_generate": custom_generate, "tokenizer": tokenizer})
        if settings.stop_strings:  # transformers does not pass the tokenizer to a custom loop
            criterion = StopStringCriteria(tokenizer, settings.stop_strings)
            stopping_criteria, arguments["stop_strings"] = [*(stopping_criteria or ()), criterion], None
        ids = arguments.get("input_ids") if inputs is None else inputs
        memory = one_cache(past_key_values, cache)
        turn = begin_turn(ids, arguments.get("attention_mask"), memory, settings.use_cache)
        if memory is None and settings.use_cache is not False:
            several = max(settings.num_beams or 1, settings.num_return_sequences or 1)
            sleep = model.sleep_settings(arguments.get("passes"), arguments.get("window"))
            memory = SleepCache(model.model, several * (1 if ids is None else len(ids)), sleep)
        if custom_generate is None and settings.get_generation_mode() in _ONE_BY_ONE:
            custom_generate = partial(sample, streamer=streamer)
        return parent.generate(
            inputs, generation_config, logits_processor, stopping_criteria, custom_generate=custom_generate,
            streamer=streamer, turn=turn, **({} if memory is None else {CACHE_NAME: memory}), **arguments,
        )  # fmt: skip

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        turn: Turn | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward: the ids that the cache has not read; without a cache all ids.

        Transformers accepts in `generate` the names of these parameters, and those of `forward` because of `kwargs`.
        """
        model: Any = self
        num_columns = input_ids.shape[1]
        if is_first_iteration and turn is not None:
            next_sequence_length = num_columns - turn.num_read
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        if turn is not None and not kwargs.get("use_cache"):
            # Each step reads the whole text again; the columns that have predicted before must predict again.
            kwargs["logits_to_keep"] = num_columns - turn.num_columns + 1
        mask = None if attention_mask is None else attention_mask.to(model.device)
        return {"input_ids": input_ids.to(model.device), "attention_mask": mask, **kwargs}
