"""The options of transformers that a sleeping model supports or refuses; docs/generation.md lists all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from sleeptrain.errors import ConfigError

# Settings of GenerationConfig with the same effect as in transformers' classes.
SERVED = frozenset((
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time",
    "stop_strings", "do_sample", "num_beams", "use_cache", "temperature", "top_k", "top_p", "min_p", "top_h",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "guidance_scale", "watermarking_config", "num_return_sequences", "output_scores", "output_logits",
    "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
))  # fmt: skip
# Without effect in any model without an encoder that is never compiled, transformers' classes included.
WITHOUT_EFFECT = frozenset(("decoder_start_token_id", "disable_compile"))

_DRAFTS = "rejected draft tokens would have to be removed from the memory, which cannot forget them; leave it out"
_ONE_CACHE = "the cache is always a memory that sleeps, of one size from the start; leave it out"
_MOVED = "transformers runs this search with code from its hub, which goes back in the cache; use num_beams instead"
_DRAFTED = (
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "speculation_type",
)  # fmt: skip
_SEARCHES = (
    "low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints",
    "force_words_ids",
)  # fmt: skip
OUTPUTS = dict.fromkeys(("output_attentions", "output_hidden_states"), "the model gives logits only; leave it out")
REFUSED = {
    **dict.fromkeys(_DRAFTED, _DRAFTS),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len"), _ONE_CACHE),
    **dict.fromkeys(_SEARCHES, _MOVED),
    **OUTPUTS,
    "prefill_chunk_size": "a prompt is read window by window; leave it out",
    "compile_config": "rows sleep at different steps, which a compiled step cannot do; leave it out",
    "continuous_batching_config": "it pages keys and values, which are dropped at the end of a window; leave it out",
    "token_healing": "it rewrites the prompt; cut off the prompt's last token instead",
}
# Settings of a transformers newer than the lists above.
UNKNOWN = frozenset(
    name
    for name in vars(GenerationConfig())
    if name not in SERVED | WITHOUT_EFFECT | set(REFUSED) | {"transformers_version"} and not name.startswith("_")
)
_NEW = "a setting of a newer transformers; its effect on a sleeping model is unknown; leave it out"
# Arguments of `generate` and `forward` that are no settings.
REFUSED_ARGUMENTS = {
    "assistant_model": _DRAFTS,
    "assistant_tokenizer": _DRAFTS,
    "synced_gpus": "each process generates by itself; leave it out",
    "inputs_embeds": "a text is read by its ids; give input_ids",
    "position_ids": "positions are counted in each row's own windows; give attention_mask where there are pads",
    "token_type_ids": "there are no types of tokens; leave it out",
}
# Arguments of `from_pretrained` that transformers accepts and this model does not support.
REFUSED_LOADING = {
    **dict.fromkeys(
        ("quantization_config", "load_in_4bit", "load_in_8bit", "gguf_file"),
        "weights are loaded as they are; give dtype, or quantise an export in transformers' own class",
    ),
    **dict.fromkeys(
        ("tp_plan", "tp_size", "device_mesh", "distributed_config", "max_memory", "offload_folder", "offload_buffers"),
        "the model stands on one device; give it, as device_map='cuda'",
    ),
    **dict.fromkeys(
        ("use_kernels", "kernel_config", "allow_all_kernels", "experts_implementation", "fusion_config"),
        "its kernels are sleeptrain's own; leave it out",
    ),
    "torchscript": "windows end at steps that depend on the text, which cannot be traced; leave it out",
}


def refuse(arguments: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Raises ConfigError for the first argument in `refused` that is on. refused: {name: reason and way out}."""
    for name, reason in refused.items():
        if _is_on(name, arguments.get(name)):
            raise ConfigError(f"{name}: {reason}")


def refuse_settings(settings: GenerationConfig, arguments: Mapping[str, Any]) -> None:
    """Check one call of `generate`. arguments: those that are no settings. Raises ConfigError."""
    refused = REFUSED | dict.fromkeys(UNKNOWN, _NEW)
    refuse({name: getattr(settings, name, None) for name in refused}, refused)
    refuse(arguments, REFUSED_ARGUMENTS)
    if isinstance(arguments.get("custom_generate"), str):
        raise ConfigError(
            "custom_generate names a folder or a hub's: give a function, which is called as in transformers"
        )
    if arguments.get("negative_prompt_ids") is not None and settings.guidance_scale in (None, 1):
        raise ConfigError("negative_prompt_ids do nothing without guidance_scale; give it, too")
    if settings.stop_strings and arguments.get("tokenizer") is None:
        raise ConfigError("stop_strings are found with the tokenizer; give it, as tokenizer=tokenizer")


def refuse_others(arguments: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Check the extra arguments of `forward`, and the outputs that `config` requests.

    Raises ConfigError, or TypeError for an argument that transformers does not have either.
    """
    for options in (arguments, {name: getattr(config, name) for name in OUTPUTS}):
        refuse(options, REFUSED_ARGUMENTS | OUTPUTS)
    if unknown := [name for name in arguments if name not in REFUSED_ARGUMENTS | OUTPUTS]:
        raise TypeError(f"forward() got an unexpected keyword argument '{unknown[0]}'")


def _is_on(name: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return bool(value) and not (name == "num_beam_groups" and value == 1)
