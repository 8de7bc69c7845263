"""Which values each setting may have by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from sleeptrain.config.schema import Config
from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError

RAMPS = ("step", "linear", "sqrt")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.norm": ("zero_centred", "plain"),
    "model.attention.qk_norm": ("none", "head", "all"),
    "sleep.when": ("every", "unlabelled"),
    "sleep.feedback": ("features", "none"),
    "sleep.eviction": ("hard", "sliding"),
    "sleep.conv_state": ("restart", "carry"),
    "sleep.recompute": ("none", "block", "pass", "window"),
    "data.source": ("shards", "rule110", "depo", "gsm_infinite"),
    "data.rule110.boundary": ("periodic", "zeros", "ones"),
    "data.layout": ("lanes", "packed", "one_document"),
    "data.shards.on_damage": ("stop", "skip"),
    "optim.muon_scaling": ("keller_jordan", "moonshot"),
    "optim.schedule": ("wsd", "cosine", "constant"),
    "train.precision": ("fp32", "bf16"),
    "train.device": ("auto", "cpu", "cuda"),
    "health.on_nonfinite": ("stop", "skip", "rollback"),
    "health.on_spike": ("stop", "skip", "rollback"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}

AT_LEAST: dict[str, int] = {
    "model.vocab_size": 0,
    "model.dim": 1,
    "model.ffn_dim": 1,
    "model.attention.num_heads": 1,
    "model.attention.num_kv_heads": 1,
    "model.attention.head_dim": 1,
    "model.attention.sliding_window": 1,
    "model.attention.scale": 0,
    "model.gated_deltanet.num_k_heads": 1,
    "model.gated_deltanet.num_v_heads": 1,
    "model.gated_deltanet.head_k_dim": 1,
    "model.gated_deltanet.head_v_dim": 1,
    "model.gated_deltanet.conv_size": 1,
    "model.gated_deltanet.norm_eps": 0,
    "model.jet.num_heads": 1,
    "model.jet.head_k_dim": 1,
    "model.jet.head_v_dim": 1,
    "model.jet.conv_size": 1,
    "model.jet.kernel_dim": 1,
    "model.mamba2.num_heads": 1,
    "model.mamba2.head_dim": 1,
    "model.mamba2.state_dim": 1,
    "model.mamba2.num_groups": 1,
    "model.mamba2.conv_size": 1,
    "sleep.passes": 1,
    "sleep.window": 1,
    "sleep.bptt_windows": 1,
    "data.sequence": 1,
    "data.batch": 1,
    "data.seed": 0,
    "data.shards.shuffle": 1,
    "data.shards.workers": 0,
    "data.shards.cache_gib": 1,
    "data.rule110.width": 3,  # a cell and its two neighbours
    "data.rule110.strings": 1,
    "data.rule110.steps": 1,
    "data.rule110.label": 0,
    "data.rule110.validation_samples": 1,
    "data.depo.nodes": 2,
    "data.depo.min_nodes": 2,
    "data.depo.hops": 1,
    "data.depo.symbols": 1,
    "data.depo.max_word": 1,
    "data.depo.queries": 1,
    "data.depo.validation_samples": 1,
    "data.gsm_infinite.min_ops": 0,  # a number that is said is asked for
    "data.gsm_infinite.max_ops": 1,
    "data.gsm_infinite.min_tokens": 1,
    "data.gsm_infinite.max_tokens": 1,
    "data.gsm_infinite.validation_samples": 1,
    "optim.muon_weight_decay": 0,
    "optim.adamw_weight_decay": 0,
    "optim.clip_norm": 0,
    "health.lost_after": 3,  # beats come every second
    "health.stall_after": 0,
    "health.timeout": 1,
    "health.norms_every": 0,
    "health.compare_every": 0,
    "health.probe_every": 0,
    "health.slow_factor": 1,
    "health.spike_factor": 0,
    "health.spike_window": 8,  # of fewer numbers the median deviation says little
    "health.max_rollbacks": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.zero": 0,
    "train.tokens": 1,
    "train.micro_batch": 0,
    "train.threads": 0,
    "train.seed": 0,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
}

ABOVE_ZERO = (
    "model.norm_eps",
    "model.jet.norm_eps",
    "model.embedding_multiplier",
    "model.residual_multiplier",
    "model.logits_divisor",
    "model.init_std",
    "model.attention.rope_theta",
    "optim.muon_lr",
    "optim.adamw_lr",
    "optim.adamw_eps",
)

FRACTIONS = (
    "model.attention.partial_rotary_factor",
    "optim.warmup_fraction",
    "optim.decay_fraction",
    "optim.min_lr_ratio",
)

# (the setting that must divide, the setting it divides)
DIVIDES = (
    ("model.attention.num_kv_heads", "model.attention.num_heads"),
    ("model.gated_deltanet.num_k_heads", "model.gated_deltanet.num_v_heads"),
    ("model.mamba2.num_groups", "model.mamba2.num_heads"),
)


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting of a configuration dataclass; a list is one setting."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def check_ranges(config: Config) -> None:
    values = dict(settings(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, not {value}")
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise ConfigError(f"{name}: unknown value '{values[name]}'; {suggest(values[name], allowed)}")
    for name, minimum in AT_LEAST.items():
        if values[name] is not None and values[name] < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, not {values[name]}")
    for name in ABOVE_ZERO:
        if values[name] <= 0:
            raise ConfigError(f"{name} must be greater than 0, not {values[name]}")
    for name in FRACTIONS:
        if not 0 <= values[name] <= 1:
            raise ConfigError(f"{name} must lie between 0 and 1, not {values[name]}")
    for divisor, dividend in DIVIDES:
        if values[dividend] % values[divisor]:
            raise ConfigError(f"{dividend} ({values[dividend]}) must be a multiple of {divisor} ({values[divisor]})")
