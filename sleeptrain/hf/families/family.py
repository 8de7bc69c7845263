"""What a family of transformers' models is to us: its settings, its tensors' names, and what it cannot express."""

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
# What blocks may have besides, and their values in a family that does not know them.
BLOCK_OPTIONS: dict[str, Any] = {
    "mixer_only": [],
    "sandwich_norms": False,
    "norm_between_passes": False,
    "attention.qkv_bias": False,
}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_divisor")
# Gives the tensor of a name; what it gives may be changed by nobody.
Read = Callable[[str], torch.Tensor]


def _same(*tensors: torch.Tensor) -> Tensors:
    return tensors


@dataclass(frozen=True)
class TensorMapping:
    """Some parameters of ours and the tensors of theirs that hold the same numbers.

    to_theirs, to_ours: from the one to the other, in the order of the names; each undoes the other bit for bit, and
    both work on the meta device.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[..., Tensors] = _same
    to_ours: Callable[..., Tensors] = _same


class Family(ABC):
    """A `model_type` of transformers' format. architecture: its class for causal language models."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    in_transformers: ClassVar[bool] = True  # else its class comes with the weights, as code that is not run
    options: ClassVar[tuple[str, ...]] = ()  # those of BLOCK_OPTIONS that it has

    def lacks(self, config: ModelConfig) -> dict[str, str]:
        """The settings of the model that the family cannot express: {setting=value: what it needs}."""
        others = {name: value for name, value in BLOCK_OPTIONS.items() if name not in self.options}
        return self._lacks(config) | other_values(config, others)

    @abstractmethod
    def _lacks(self, config: ModelConfig) -> dict[str, str]:
        """The same, without `BLOCK_OPTIONS`."""

    def to_config(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of the same model, without a tokenizer's ids. Raises ConfigError where there is none."""
        self.check_expressible(config)
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        # Without attention transformers cannot tell how many tokens a cache has seen.
        cache = {"use_cache": "attention" in config.layers}
        header = {"model_type": self.model_type, "architectures": [self.architecture]}
        return header | _common(config) | self._settings(config) | ids | cache

    @abstractmethod
    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        """What `config.json` says of a model that the family can express, besides what it says of all."""

    @abstractmethod
    def from_config(self, found: Mapping[str, Any]) -> ModelConfig:
        """The settings of the model that a complete `config.json` describes. Raises ConfigError for one we lack."""

    def remarks(self, found: Mapping[str, Any]) -> list[str]:
        """What somebody who imports such a model must know of what becomes of it; a line each."""
        return []

    @abstractmethod
    def links(self, config: ModelConfig) -> list[TensorMapping]:
        """All tensors, in the order of the model. With tied embeddings theirs have no head of their own."""

    def canonical(self, name: str) -> str | None:
        """The name in `links` of a tensor in one of the family's files; None for what belongs to no text model."""
        return name

    def check_expressible(self, config: ModelConfig) -> None:
        """Raises ConfigError with the settings that the family cannot express."""
        if lacking := self.lacks(config):
            reasons = "; ".join(f"{setting} ({needs})" for setting, needs in lacking.items())
            raise ConfigError(f"{self.model_type} cannot express {reasons}")

    def to_theirs(self, config: ModelConfig, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
        """Their tensors, one link at a time, from ours."""
        for link in self.links(config):
            yield from zip(link.theirs, link.to_theirs(*map(read, link.ours)), strict=True)

    def to_ours(self, config: ModelConfig, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
        """Our parameters, one link at a time, from theirs."""
        for link in self.links(config):
            yield from zip(link.ours, link.to_ours(*map(read, link.theirs)), strict=True)

    def their_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of all their tensors."""
        with torch.device("meta"):
            ours = dict(Hybrid(config).named_parameters())
        return {name: tuple(t.shape) for name, t in self.to_theirs(config, ours.__getitem__)}


def _common(config: ModelConfig) -> dict[str, Any]:
    """The keys that the `config.json` of every family has."""
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


def common_settings(model_type: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model that the `config.json` of every family tells under the same keys."""
    keys = {
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    }
    return {ours: setting(model_type, found, theirs) for ours, theirs in keys.items()}


def stays_wide(name: str) -> bool:
    """Whether a tensor of theirs is a decay parameter, which a file of narrower weights keeps in fp32."""
    return name.rsplit(".", 1)[-1] in DECAY_PARAMETERS


def top_mappings(
    config: ModelConfig, norm: Callable[[str, str], TensorMapping]
) -> tuple[list[TensorMapping], list[TensorMapping]]:
    """Embeddings, and the last norm and head, which all families name alike."""
    head = [] if config.tie_embeddings else [rename("head.weight", "lm_head.weight")]
    return [rename("embedding.weight", "model.embed_tokens.weight")], [norm("norm.weight", "model.norm.weight"), *head]


def rename(ours: str, theirs: str) -> TensorMapping:
    return TensorMapping((ours,), (theirs,))


def renamed(ours: str, theirs: str, names: Mapping[str, str]) -> list[TensorMapping]:
    """Links below two modules, by {our name: their name}."""
    return [rename(f"{ours}.{a}", f"{theirs}.{b}") for a, b in names.items()]


def mlp_mappings(ours: str, theirs: str) -> list[TensorMapping]:
    """Links of a SwiGLU feed-forward whose matrices have the same names."""
    return renamed(ours, theirs, {f"{name}_proj.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")})


def conv_mapping(ours: str, theirs: str) -> TensorMapping:
    """Kernels of a depthwise convolution: [channels, width] here, [channels, 1, width] there."""
    return TensorMapping((ours,), (theirs,), lambda w: (w.unsqueeze(1),), lambda w: (w.squeeze(1),))


def expect(model_type: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ConfigError at the first key of a `config.json` whose value we have no model for."""
    for key, value in wanted.items():
        if setting(model_type, found, key) != value:
            raise ConfigError(f"config.json: {key}={found[key]!r} is not supported for {model_type}, only {value!r}")


def setting(model_type: str, found: Mapping[str, Any], key: str) -> Any:
    """The value of a key. Raises ConfigError where there is none."""
    if key not in found:
        raise ConfigError(f"config.json has no {key}, which {model_type} needs")
    return found[key]


def layer_kinds(model_type: str, found: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """Our names of `layer_types`. Raises ConfigError for one that is not in `kinds`."""
    types = setting(model_type, found, "layer_types")
    if unknown := sorted(set(types) - set(kinds)):
        raise ConfigError(f"config.json: layer_types holds {', '.join(unknown)}, which sleeptrain does not have")
    return [kinds[kind] for kind in types]


def foreign_mixers(config: ModelConfig, known: tuple[str, ...]) -> dict[str, str]:
    """The part of `lacks` about mixers."""
    foreign = sorted(set(config.layers) - set(known))
    return {f"model.layers with {kind}": f"it has {' and '.join(known)}" for kind in foreign}


def other_values(config: ModelConfig, wanted: Mapping[str, Any]) -> dict[str, str]:
    """The part of `lacks` about settings that a family fixes: {setting below `model`: its only value}."""
    found = {}
    for name, value in wanted.items():
        mine = attrgetter(name)(config)
        if mine != value:
            found[f"model.{name}={_written(mine)}"] = f"it has {_written(value)}"
    return found


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def norm_mapping(kind: str) -> Callable[[str, str], TensorMapping]:
    """Links of norms whose weight is plain there; kind: `model.norm` here.

    Out of a zero-centred norm comes the scale that it computes with, which cannot be undone bit for bit.
    """
    if kind == "plain":
        return rename
    return lambda ours, theirs: TensorMapping((ours,), (theirs,), lambda w: (1 + w,), lambda w: (w - 1,))


def own_head_dim(config: ModelConfig) -> dict[str, int]:
    """The key of a `config.json` that says how wide heads are, where it is not `hidden_size / num_attention_heads`."""
    attention = config.attention
    usual = attention.num_heads * attention.head_dim == config.dim
    return {} if usual or "attention" not in config.layers else {"head_dim": attention.head_dim}


def head_dim(model_type: str, found: Mapping[str, Any]) -> int:
    """The width of a head, with that key or without."""
    dim, heads = (setting(model_type, found, key) for key in ("hidden_size", "num_attention_heads"))
    return found.get("head_dim") or dim // heads


def check_rope(rope: Mapping[str, Any]) -> None:
    """Raises ConfigError for positions that are scaled for long contexts."""
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"config.json: rope_type={rope['rope_type']!r} is not supported, only 'default'")
