"""Run transformers' model of a folder over windows and passes, through its public forward.

A cache carries the state over eviction boundaries: its recurrent layers keep S alone, its attention layers keep
nothing. Features are fed back as `inputs_embeds`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.config_file import read_config, understanding
from sleeptrain.hf.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Functions that transformers imports from other packages if they are installed, on any device.
_REPLACED = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule", "mamba2_chunk_scan")


def transformers_module() -> Any:
    """The module. Raises ConfigError: transformers is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("conversion needs transformers; install it with pip install 'sleeptrain[hf]'") from error
    return transformers


def cache_name() -> str:
    """The name of the cache in arguments and outputs of this transformers; newer versions deprecate the longer one."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in {each.name for each in fields(CausalLMOutputWithPast)} else "past_key_values"


def complete_config(folder: Path) -> Any:
    """The settings of a folder's text model, with transformers' defaults for keys missing in `config.json`.

    Raises DataError: transformers cannot read them.
    """
    transformers = transformers_module()
    written = read_config(folder)
    with understanding(folder / "config.json", "is not understood by transformers"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return text_config(config, written)


def text_config(config: Any, written: Mapping[str, Any]) -> Any:
    """The settings of the text model inside those of a multimodal one.

    written: the `config.json`. Its `tie_word_embeddings` may stand outside of the text model's settings.
    """
    text = config.get_text_config()
    if text is not config and "tie_word_embeddings" not in written.get("text_config", {}):
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


def load_native(folder: Path, family: Family) -> PreTrainedModel:
    """The model in fp32 on the CPU. Raises DataError: tensors are missing or unexpected."""
    transformers = transformers_module()
    with quiet(transformers):
        model, info = getattr(transformers, family.architecture).from_pretrained(
            folder,
            config=complete_config(folder),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if wrong := {kind: names for kind, names in info.items() if names}:
        raise DataError(f"transformers does not read {folder} as it should: {wrong}")
    return model.eval()


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence the warnings and progress bars of transformers."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@torch.no_grad()
def native_logits(model: PreTrainedModel, tokens_BT: torch.Tensor, window: int, passes: int) -> torch.Tensor:
    """The logits [B, T, V] of the wake passes. Every window sleeps: `passes` passes, the wake pass counted."""
    features: list[torch.Tensor] = []
    cache, logits = _cache(model), []
    scale = getattr(model.config, "embedding_multiplier", 1.0)  # scales all inputs, features too
    norm = model.get_decoder().norm
    hook = norm.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        with _torch_functions(model), quiet(transformers_module()):
            for part in tokens_BT.split(window, dim=1):
                positions = torch.arange(part.shape[1]).expand_as(part)
                options = {cache_name(): cache, "use_cache": True, "position_ids": positions}
                logits.append(model(input_ids=part, **options).logits)
                for _ in range(passes - 1):
                    fed_back = features.pop() / scale
                    model(inputs_embeds=fed_back, logits_to_keep=1, **options)
                features.clear()
    finally:
        hook.remove()
    return torch.cat(logits, dim=1)


def _cache(model: PreTrainedModel) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

    class Memory(LinearAttentionLayer):
        """Keeps S; convolutions restart in each call."""

        def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            self.is_recurrent_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
            return recurrent_states

        def update_conv_state(self, conv_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return conv_states

    class Evicted(DynamicLayer):
        """Keeps nothing: each call sees its own tokens."""

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return key_states, value_states

    class Boundary(DynamicCache):
        """Reports zero tokens seen, also in models without attention layers."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

    cache = Boundary(config=model.config)
    cache.layers = [Memory() if isinstance(layer, LinearAttentionLayer) else Evicted() for layer in cache.layers]
    return cache


@contextmanager
def _torch_functions(model: PreTrainedModel) -> Iterator[None]:
    """Use PyTorch's recurrences on the CPU, even if a package of GPU kernels is installed."""
    module = sys.modules[type(model).__module__]
    before = {name: getattr(module, name) for name in _REPLACED if hasattr(module, name)}
    for name, function in before.items():
        setattr(module, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
