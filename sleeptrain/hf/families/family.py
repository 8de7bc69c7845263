"""The base class of a family: its settings, the names of its tensors, and the settings that it cannot express."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch

from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.model.decay import DECAY_PARAMETERS
from sleeptrain.model.hybrid import Hybrid

Tensors = tuple[torch.Tensor, ...]
# Options of blocks, with the value that a family without the option needs.
BLOCK_OPTIONS: dict[str, Any] = {
    "mixer_only": [],
    "sandwich_norms": False,
    "norm_between_passes": False,
    "attention.qkv_bias": False,
}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_divisor")
# Maps a name to its tensor. Callers must not change the tensor.
Read = Callable[[str], torch.Tensor]


def _same(*tensors: torch.Tensor) -> Tensors:
    return tensors


@dataclass(frozen=True)
class TensorMapping:
    """Some parameters of sleeptrain and the tensors of a family that hold the same numbers.

    ours: names of the parameters.
    theirs: names of the tensors.
    to_theirs: takes the parameters in the order of `ours`, returns the tensors in the order of `theirs`.
    to_ours: the inverse, bit for bit. Both also work on the meta device.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[..., Tensors] = _same
    to_ours: Callable[..., Tensors] = _same


class Family(ABC):
    """A `model_type` of transformers. architecture: the name of its class for causal language models."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    in_transformers: ClassVar[bool] = (
        True  # False: its class is published beside the weights; sleeptrain does not run it
    )
    options: ClassVar[tuple[str, ...]] = ()  # the names in BLOCK_OPTIONS that it supports

    def lacks(self, config: ModelConfig) -> dict[str, str]:
        """The settings of the model that the family cannot express: {"setting=value": what the family has}."""
        others = {name: value for name, value in BLOCK_OPTIONS.items() if name not in self.options}
        return self._lacks(config) | other_values(config, others)

    @abstractmethod
    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        """The same, without `BLOCK_OPTIONS`."""

    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of the model, without ids of a tokenizer. Raises ConfigError: `lacks` is not empty."""
        self.check_expressible(config)
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        # In a model without attention, transformers does not know how many tokens a cache has seen.
        cache = {"use_cache": "attention" in config.layers}
        header = {"model_type": self.model_type, "architectures": [self.architecture]}
        return header | _common(config) | self._settings(config) | ids | cache

    @abstractmethod
    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of `config.json` that are specific to the family, for a model that it can express."""

    @abstractmethod
    def from_config(self, config_dict: Mapping[str, Any]) -> ModelConfig:
        """The model settings in a complete `config.json`. Raises ConfigError: sleeptrain has no such model."""

    def remarks(self, config_dict: Mapping[str, Any]) -> list[str]:
        """One line for each change of the model's behaviour by the import."""
        return []

    @abstractmethod
    def mappings(self, config: ModelConfig) -> list[TensorMapping]:
        """The mappings of all tensors, in the order of the model. With tied embeddings the family has no head."""

    def canonical(self, name: str) -> str | None:
        """The name in `mappings` of a tensor in a file of the family; None if it belongs to no text model."""
        return name

    def check_expressible(self, config: ModelConfig) -> None:
        """Raises ConfigError: the family cannot express some settings. The message lists them."""
        if lacking := self.lacks(config):
            reasons = "; ".join(f"{setting} ({needs})" for setting, needs in lacking.items())
            raise ConfigError(f"{self.model_type} cannot express {reasons}")

    def to_theirs(self, config: ModelConfig, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of the family from our parameters, one mapping at a time."""
        for mapping in self.mappings(config):
            yield from zip(mapping.theirs, mapping.to_theirs(*map(read, mapping.ours)), strict=True)

    def to_ours(self, config: ModelConfig, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, parameter) of sleeptrain from the family's tensors, one mapping at a time."""
        for mapping in self.mappings(config):
            yield from zip(mapping.ours, mapping.to_ours(*map(read, mapping.theirs)), strict=True)

    def their_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all tensors of the family."""
        with torch.device("meta"):
            ours = dict(Hybrid(config).named_parameters())
        return {name: tuple(t.shape) for name, t in self.to_theirs(config, ours.__getitem__)}


def _common(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that all families share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": len(config.layers),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
    }


def common_settings(model_type: str, config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The model settings that all families store under the same keys of `config.json`."""
    keys = {
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    }
    return {ours: setting(model_type, config_dict, theirs) for ours, theirs in keys.items()}


def stays_wide(name: str) -> bool:
    """True for the name of a decay parameter, which stays in fp32 in files of narrower weights."""
    return name.rsplit(".", 1)[-1] in DECAY_PARAMETERS


def top_mappings(
    config: ModelConfig, norm: Callable[[str, str], TensorMapping]
) -> tuple[list[TensorMapping], list[TensorMapping]]:
    """(mappings of the embeddings, mappings of last norm and head). All families use the same names."""
    head = [] if config.tie_embeddings else [rename("head.weight", "lm_head.weight")]
    return [rename("embedding.weight", "model.embed_tokens.weight")], [norm("norm.weight", "model.norm.weight"), *head]


def rename(ours: str, theirs: str) -> TensorMapping:
    return TensorMapping((ours,), (theirs,))


def renamed(ours: str, theirs: str, names: Mapping[str, str]) -> list[TensorMapping]:
    """Mappings below the modules `ours` and `theirs`. names: {our name: their name}."""
    return [rename(f"{ours}.{a}", f"{theirs}.{b}") for a, b in names.items()]


def mlp_mappings(ours: str, theirs: str) -> list[TensorMapping]:
    """Mappings of a SwiGLU feed-forward whose matrices have the same names."""
    return renamed(ours, theirs, {f"{name}_proj.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")})


def conv_mapping(ours: str, theirs: str) -> TensorMapping:
    """Kernels of a depthwise convolution: ours are [channels, width], theirs [channels, 1, width]."""
    return TensorMapping((ours,), (theirs,), lambda w: (w.unsqueeze(1),), lambda w: (w.squeeze(1),))


def expect(model_type: str, config_dict: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ConfigError at the first key of a `config.json` whose value is not the one in `wanted`."""
    for key, value in wanted.items():
        if setting(model_type, config_dict, key) != value:
            raise ConfigError(
                f"config.json: {key}={config_dict[key]!r} is not supported for {model_type}, only {value!r}"
            )


def setting(model_type: str, config_dict: Mapping[str, Any], key: str) -> Any:
    """The value of a key. Raises ConfigError: the key is missing."""
    if key not in config_dict:
        raise ConfigError(f"config.json has no {key}, which {model_type} needs")
    return config_dict[key]


def layer_kinds(model_type: str, config_dict: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """The mixers of `layer_types`. kinds: {their name: our name}. Raises ConfigError: a name is not in `kinds`."""
    types = setting(model_type, config_dict, "layer_types")
    if unknown := sorted(set(types) - set(kinds)):
        raise ConfigError(f"config.json: layer_types holds {', '.join(unknown)}, which sleeptrain does not have")
    return [kinds[kind] for kind in types]


def foreign_mixers(config: ModelConfig, known: tuple[str, ...]) -> dict[str, str]:
    """The entries of `lacks` for mixers that the family does not have. known: the mixers that it has."""
    foreign = sorted(set(config.layers) - set(known))
    return {f"model.layers with {kind}": f"it has {' and '.join(known)}" for kind in foreign}


def other_values(config: ModelConfig, wanted: Mapping[str, Any]) -> dict[str, str]:
    """The entries of `lacks` for settings with a fixed value. wanted: {setting below `model`: that value}."""
    lacking = {}
    for name, value in wanted.items():
        actual = attrgetter(name)(config)
        if actual != value:
            lacking[f"model.{name}={_text(actual)}"] = f"it has {_text(value)}"
    return lacking


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def norm_mapping(kind: str) -> Callable[[str, str], TensorMapping]:
    """Makes mappings of norms for a family whose norms multiply by the plain weight. kind: `model.norm`.

    A zero-centred weight w becomes 1 + w. This rounds, so the inverse is not exact bit for bit.
    """
    if kind == "plain":
        return rename
    return lambda ours, theirs: TensorMapping((ours,), (theirs,), lambda w: (1 + w,), lambda w: (w - 1,))


def own_head_dim(config: ModelConfig) -> dict[str, int]:
    """{"head_dim": width}, or {} if the width of a head is `hidden_size / num_attention_heads`."""
    attention = config.attention
    usual = attention.num_heads * attention.head_dim == config.dim
    return {} if usual or "attention" not in config.layers else {"head_dim": attention.head_dim}


def head_dim(model_type: str, config_dict: Mapping[str, Any]) -> int:
    """The width of a head: `head_dim`, or its default if the key is missing."""
    dim, heads = (setting(model_type, config_dict, key) for key in ("hidden_size", "num_attention_heads"))
    return config_dict.get("head_dim") or dim // heads


def check_rope(rope: Mapping[str, Any]) -> None:
    """Raises ConfigError: the rotary positions are scaled for long contexts."""
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json: rope_type={rope['rope_type']!r} is not supported, only 'default'")
