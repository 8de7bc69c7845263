"""What is trained at which rate, and when: frozen parts by stages of tokens seen, and rates of groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError
from sleeptrain.optim.optimizers import ParameterRole


def frozen_stage(optim: OptimConfig, tokens_seen: int) -> int:
    """The stage in force: 0 is that of `optim.frozen`, the others are those of `optim.curriculum`."""
    return sum(tokens_seen >= stage.tokens for stage in optim.curriculum)


def num_frozen_stages(optim: OptimConfig) -> int:
    return 1 + len(optim.curriculum)


def with_rates(roles: Mapping[str, ParameterRole], optim: OptimConfig) -> dict[str, ParameterRole]:
    """The roles of all parameters of a whole model, with the rates and frozen stages that the settings give them.

    Raises ConfigError for a pattern that matches no parameter, and for a stage in which nothing is trained.
    """
    stages = [("optim.frozen", optim.frozen)]
    stages += [(f"optim.curriculum[{i}].frozen", stage.frozen) for i, stage in enumerate(optim.curriculum)]
    for setting, patterns in stages:
        _check_patterns(setting, (pattern.removeprefix("!") for pattern in patterns), roles)
        if all(is_frozen(name, patterns) for name in roles):
            raise ConfigError(f"{setting} freezes every parameter: except some of them by a pattern !NAME at its end")
    _check_patterns("optim.rates", (rate.parameters for rate in optim.rates), roles)

    def treated(name: str, role: ParameterRole) -> ParameterRole:
        factors = [rate.factor for rate in optim.rates if fnmatchcase(name, rate.parameters)]
        frozen = tuple(i for i, (_, patterns) in enumerate(stages) if is_frozen(name, patterns))
        return replace(role, factor=factors[-1] if factors else 1.0, frozen=frozen)

    return {name: treated(name, role) for name, role in roles.items()}


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether the last pattern that matches the name says so; a pattern that begins with ! says no."""
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
