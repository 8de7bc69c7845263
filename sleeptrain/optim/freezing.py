"""Which parameters are frozen in which stage of tokens seen, and the learning rate factors of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError
from sleeptrain.optim.optimizers import ParameterRole


def frozen_stage(optim: OptimConfig, tokens_seen: int) -> int:
    """The stage in force: 0 is `optim.frozen`, i > 0 is `optim.curriculum[i - 1]`."""
    return sum(tokens_seen >= stage.tokens for stage in optim.curriculum)


def num_frozen_stages(optim: OptimConfig) -> int:
    return 1 + len(optim.curriculum)


def with_rates(roles: Mapping[str, ParameterRole], optim: OptimConfig) -> dict[str, ParameterRole]:
    """The roles of all parameters of a whole model, with the rate factors and frozen stages of the settings.

    Raises ConfigError for a pattern that matches no parameter, and for a stage that trains nothing.
    """
    stages = [("optim.frozen", optim.frozen)]
    stages += [(f"optim.curriculum[{i}].frozen", stage.frozen) for i, stage in enumerate(optim.curriculum)]
    for setting, patterns in stages:
        _check_patterns(setting, (pattern.removeprefix("!") for pattern in patterns), roles)
        if all(is_frozen(name, patterns) for name in roles):
            raise ConfigError(f"{setting} freezes every parameter: exclude some of them with a last pattern !NAME")
    _check_patterns("optim.rates", (rate.parameters for rate in optim.rates), roles)

    def with_rate(name: str, role: ParameterRole) -> ParameterRole:
        factors = [rate.factor for rate in optim.rates if fnmatchcase(name, rate.parameters)]
        frozen = tuple(i for i, (_, patterns) in enumerate(stages) if is_frozen(name, patterns))
        return replace(role, factor=factors[-1] if factors else 1.0, frozen=frozen)

    return {name: with_rate(name, role) for name, role in roles.items()}


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """True if the last pattern that matches the name freezes it. A pattern that begins with ! does not freeze."""
    frozen = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            frozen = not pattern.startswith("!")
    return frozen


def _check_patterns(setting: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{setting}: no parameter of the model matches '{pattern}'; names are as in blocks.0.mixer.*"
            )
