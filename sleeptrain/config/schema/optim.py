"""Settings of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.setting import setting


@dataclass
class FrozenStage:
    """The parameters that are not trained from `tokens` seen on."""

    tokens: int = setting(0, "in force from this many tokens seen on", allowed=">= 1")
    frozen: list[str] = setting(
        [], "in place of `optim.frozen`; empty: everything is trained", allowed="a list of patterns"
    )


@dataclass
class Rate:
    """Parameters whose learning rate is `factor` times the rate of their optimizer."""

    parameters: str = setting("", "such as `blocks.4.*`", allowed="a pattern of names")
    factor: float = setting(1.0, "factor on the rate of their optimizer", allowed="> 0")


@dataclass
class OptimConfig:
    """Muon on the body's matrices, AdamW on the rest."""

    muon_lr: float = setting(2e-3, "peak rate of Muon", above=0)
    muon_momentum: float = setting(0.95, "Nesterov momentum", allowed="0 to below 1")
    muon_weight_decay: float = setting(1e-4, "decoupled decay", at_least=0)
    muon_scaling: str = setting(
        "keller_jordan", "size of an update, see [numerics](numerics.md#muon)", choices=("keller_jordan", "moonshot")
    )
    adamw_lr: float = setting(1e-3, "peak rate of AdamW", above=0)
    adamw_betas: list[float] = setting([0.9, 0.95], "AdamW's averages", allowed="two, 0 to below 1")
    adamw_weight_decay: float = setting(1e-4, "decoupled decay, matrices only", at_least=0)
    adamw_eps: float = setting(1e-8, "AdamW's epsilon", above=0)
    clip_norm: float = setting(1.0, "largest norm of all gradients; 0 is no clipping", at_least=0)
    schedule: str = setting(
        "wsd", "see [training](training.md#optimizers-and-schedule)", choices=("wsd", "cosine", "constant")
    )
    warmup_fraction: float = setting(0.01, "share of the tokens over which the rate rises", at_least=0, at_most=1)
    decay_fraction: float = setting(
        0.2, "`wsd`: last share over which it falls; with the warm-up at most 1", at_least=0, at_most=1
    )
    min_lr_ratio: float = setting(0.0, "where the rate ends, as a share of its peak", at_least=0, at_most=1)
    rates: list[Rate] = setting(
        [], "rates of groups of parameters, see below; the last match of a name counts", allowed="a list of rates"
    )
    frozen: list[str] = setting(
        [],
        "parameters that are not trained; `!pattern` is an exception to the patterns before it "
        "([training](training.md#frozen-parts-and-rates-of-groups))",
        allowed="a list of patterns",
    )
    curriculum: list[FrozenStage] = setting(
        [], "other frozen parts later on, see below; sorted by `tokens`", allowed="a list of stages"
    )
