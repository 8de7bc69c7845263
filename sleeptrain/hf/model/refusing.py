"""Methods of transformers' models that would have no effect or a wrong one here. Each raises and names the way out."""

from __future__ import annotations

from typing import Any, NoReturn

from sleeptrain.errors import ConfigError

_RECOMPUTE = "train with `sleeptrain train`, where sleep.recompute saves memory, or leave it out"
_PARTS = "the model's parts are those of its config; make another model of another config"
_PAGES = "it pages keys and values, which are dropped at the end of a window; generate() takes batches"


def _cannot(what: str, way_out: str) -> NoReturn:
    raise ConfigError(f"{what}: {way_out}")


class Refusing:
    """A base class that must come before `PreTrainedModel` and `GenerationMixin`."""

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("activation_checkpointing_enable", _RECOMPUTE)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("gradient_checkpointing_enable", _RECOMPUTE)

    def set_input_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("set_input_embeddings", _PARTS)

    def set_output_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("set_output_embeddings", _PARTS)

    def set_decoder(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("set_decoder", _PARTS)

    def set_encoder(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("set_encoder", _PARTS)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """The embeddings, if the number of ids stays the same. Raises ConfigError otherwise."""
        model: Any = self
        if new_num_tokens not in (None, model.config.vocab_size):
            _cannot(
                f"resize_token_embeddings({new_num_tokens})", "model.vocab_size is set before the training; keep it"
            )
        return model.get_input_embeddings()

    def resize_position_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("resize_position_embeddings", "there are none: positions are rotations inside a window; leave it out")

    def get_position_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("get_position_embeddings", "there are none: positions are rotations inside a window")

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """transformers calls this at the start and at each change."""
        if requested_attention not in (None, "sdpa"):
            _cannot(
                f"attn_implementation='{requested_attention}'", "attention is computed by torch's sdpa; leave it out"
            )
        return "sdpa"

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *_: Any, **__: Any) -> None:
        names = attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        for name in names:
            self.get_correct_attn_implementation(name)

    def set_use_kernels(self, use_kernels: bool, *_: Any, **__: Any) -> None:
        if use_kernels:
            _cannot("set_use_kernels(True)", "its kernels are sleeptrain's own; leave it out")

    def dequantize(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("dequantize", "the weights are not quantised")

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("generate_batch", _PAGES)

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("init_continuous_batching", _PAGES)

    def continuous_batching_context_manager(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("continuous_batching_context_manager", _PAGES)

    def heal_tokens(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("heal_tokens", "it rewrites the prompt; cut off the prompt's last token instead")

    def load_custom_generate(self, *_: Any, **__: Any) -> NoReturn:
        _cannot("load_custom_generate", "give generate() a function, as custom_generate=function")
