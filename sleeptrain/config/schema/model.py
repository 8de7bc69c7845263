"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sleeptrain.config.setting import setting


@dataclass
class AttentionConfig:
    """Softmax attention inside a window: grouped-query, optional output gate and q/k norms, partial RoPE."""

    num_heads: int = setting(4, "query heads, a multiple of `num_kv_heads`", at_least=1, on_resume="fixed")
    num_kv_heads: int = setting(2, "key and value heads", at_least=1, on_resume="fixed")
    head_dim: int = setting(32, "width of a head", at_least=1, on_resume="fixed")
    rope_theta: float = setting(10_000.0, "base of the rotary positions", above=0)
    partial_rotary_factor: float = setting(
        0.5, "share of a head that is rotated, an even number of dimensions; 0 is no positions", at_least=0, at_most=1
    )
    gate: bool = setting(True, "a sigmoid gate on the output", on_resume="fixed")
    qk_norm: str = setting(
        "head",
        "a norm on queries and keys: of each head, or of all heads together (not with `parallel.tensor`)",
        choices=("none", "head", "all"),
        on_resume="fixed",
    )
    qkv_bias: bool = setting(False, "biases of queries, keys and values", on_resume="fixed")
    scale: float = setting(0.0, "factor of the scores; 0 is 1 / sqrt(`head_dim`)", at_least=0)
    post_norm: bool = setting(
        False,
        "attention blocks norm the outputs of mixer and feed-forward, not the inputs (not with `parallel.tensor`)",
        on_resume="fixed",
    )
    sliding_window: int = setting(
        1024, "tokens to which a token attends in a `sliding_attention` block, itself included", at_least=1
    )


@dataclass
class GatedDeltaNetConfig:
    """Gated DeltaNet mixer: state S is [num_v_heads, head_k_dim, head_v_dim] for each sequence."""

    num_k_heads: int = setting(4, "key heads", at_least=1, on_resume="fixed")
    num_v_heads: int = setting(4, "value heads, a multiple of `num_k_heads`", at_least=1, on_resume="fixed")
    head_k_dim: int = setting(
        32, "width of keys; S is [num_v_heads, head_k_dim, head_v_dim]", at_least=1, on_resume="fixed"
    )
    head_v_dim: int = setting(32, "width of values", at_least=1, on_resume="fixed")
    conv_size: int = setting(4, "taps of the short convolution", at_least=1, on_resume="fixed")
    allow_neg_eigval: bool = setting(False, "writes of strength 0 to 2 instead of 0 to 1", on_resume="fixed")
    norm_eps: float = setting(0.0, "epsilon of the gated norm; 0 is `model.norm_eps`", at_least=0, on_resume="fixed")


@dataclass
class JetConfig:
    """JetBlock mixer: S is [num_heads, head_k_dim, head_v_dim] for each sequence; values pass a dynamic convolution."""

    num_heads: int = setting(4, "heads", at_least=1, on_resume="fixed")
    head_k_dim: int = setting(
        32, "width of keys; S is [num_heads, head_k_dim, head_v_dim]", at_least=1, on_resume="fixed"
    )
    head_v_dim: int = setting(64, "width of values", at_least=1, on_resume="fixed")
    conv_size: int = setting(4, "taps of the values' dynamic convolution", at_least=1, on_resume="fixed")
    kernel_dim: int = setting(
        32, "hidden width of the network that computes kernels from features", at_least=1, on_resume="fixed"
    )
    norm_eps: float = setting(1e-5, "epsilon of the gated norm", above=0, on_resume="fixed")


@dataclass
class Mamba2Config:
    """Mamba-2 (SSD) mixer: S is [num_heads, state_dim, head_dim] for each sequence; a group's heads share B and C."""

    num_heads: int = setting(8, "heads, a multiple of `num_groups`", at_least=1, on_resume="fixed")
    head_dim: int = setting(32, "width of a head", at_least=1, on_resume="fixed")
    state_dim: int = setting(
        64, "size of the state; S is [num_heads, state_dim, head_dim]", at_least=1, on_resume="fixed"
    )
    num_groups: int = setting(1, "groups of heads that share B and C", at_least=1, on_resume="fixed")
    conv_size: int = setting(4, "taps of the short convolution", at_least=1, on_resume="fixed")


@dataclass
class ModelConfig:
    """The decoder. `layers` lists each block's mixer: attention | sliding_attention | gated_deltanet | jet | mamba2."""

    vocab_size: int = setting(0, "number of ids; 0 takes the data's", at_least=0, on_resume="fixed")
    dim: int = setting(128, "width of the features", at_least=1, on_resume="fixed")
    ffn_dim: int = setting(384, "width of the feed-forward", at_least=1, on_resume="fixed")
    layers: list[str] = setting(
        ["attention", "gated_deltanet"] * 2,
        "the mixer of each block, in order",
        allowed="`attention`, `sliding_attention`, `gated_deltanet`, `jet`, `mamba2`",
        on_resume="fixed",
    )
    mixer_only: list[int] = setting(
        [],
        "blocks that have no feed-forward; they begin as the identity",
        allowed="a list of blocks",
        on_resume="fixed",
    )
    norm: str = setting(
        "zero_centred",
        "the factor of a norm: 1 + its weight, or its weight",
        choices=("zero_centred", "plain"),
        on_resume="fixed",
    )
    norm_eps: float = setting(1e-6, "epsilon of the norms", above=0)
    sandwich_norms: bool = setting(
        False, "a norm after mixer and feed-forward too, before they are added", on_resume="fixed"
    )
    norm_between_passes: bool = setting(
        False, "sleep passes read the features after the last norm; `sleep.core` must end at the last block"
    )
    embedding_multiplier: float = setting(1.0, "factor of the embeddings", above=0)
    residual_multiplier: float = setting(1.0, "factor of the outputs of mixers and feed-forwards", above=0)
    logits_divisor: float = setting(1.0, "divisor of the logits", above=0)
    tie_embeddings: bool = setting(True, "the head is the embedding's matrix", on_resume="fixed")
    init_std: float = setting(0.02, "standard deviation of weights at the start", above=0)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    gated_deltanet: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    jet: JetConfig = field(default_factory=JetConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mixers: dict[str, Any] = setting(
        {},
        "settings of mixers from other packages, by the name of the mixer",
        allowed="`+model.mixers.NAME.SETTING=`",
        on_resume="fixed",
    )
