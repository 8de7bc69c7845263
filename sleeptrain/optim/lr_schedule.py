"""The learning rate as a function of tokens seen, one factor for both optimizers."""

from __future__ import annotations

import math

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError

SCHEDULES = ("wsd", "cosine", "constant")


def lr_scale(tokens_seen: int, total_tokens: int, config: OptimConfig) -> float:
    """The factor on the peak rates after `tokens_seen` of `total_tokens` tokens, in [0, 1].

    It rises linearly from 0 over the first `warmup_fraction` of the tokens. Then `wsd` (warm-up, stable, decay;
    arXiv 2404.06395) stays at 1 and falls linearly to `min_lr_ratio` over the last `decay_fraction`. `cosine` falls to
    `min_lr_ratio` from the end of the warm-up on; `constant` does not fall. After the last token the value stays.
    Raises ConfigError for an unknown schedule, a fraction outside [0, 1], or fractions whose sum exceeds 1.
    """
    _check(total_tokens, config)
    done = min(tokens_seen / total_tokens, 1.0)
    if done < config.warmup_fraction:
        return done / config.warmup_fraction
    floor = config.min_lr_ratio
    if config.schedule == "wsd":
        return max(floor, 1 - (1 - floor) * _progress(done, 1 - config.decay_fraction))
    if config.schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * _progress(done, config.warmup_fraction))) / 2
    return 1.0


def _progress(done: float, start: float) -> float:
    """The position of `done` between `start` and 1, as a fraction in [0, 1]; 0 if start is 1."""
    return max(0.0, done - start) / (1 - start) if start < 1 else 0.0


def _check(total_tokens: int, config: OptimConfig) -> None:
    if total_tokens <= 0:
        raise ConfigError(f"train.tokens is {total_tokens}; a schedule needs at least one token")
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule is {config.schedule!r}; it is one of {', '.join(SCHEDULES)}")
    for name in ("warmup_fraction", "decay_fraction", "min_lr_ratio"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"optim.{name} is {getattr(config, name)}; it is a share between 0 and 1")
    if config.schedule == "wsd" and config.warmup_fraction + config.decay_fraction > 1 + 1e-9:
        raise ConfigError(
            f"optim.warmup_fraction {config.warmup_fraction} and optim.decay_fraction {config.decay_fraction} overlap: "
            "their sum is at most 1"
        )
