"""Range checks: the values that each setting's declaration allows, and the settings that must divide others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from sleeptrain.config.schema import Config
from sleeptrain.config.setting import declared_settings
from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError

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
    """Raises ConfigError if a setting is out of its range or does not divide another."""
    check_section(config)
    values = dict(settings(config))
    for divisor, dividend in DIVIDES:
        if values[dividend] % values[divisor]:
            raise ConfigError(f"{dividend} ({values[dividend]}) must be a multiple of {divisor} ({values[divisor]})")


def check_section(section: Any, prefix: str = "") -> None:
    """Raises ConfigError if a setting of a configuration dataclass has a value that its declaration does not allow.

    prefix: prefix of the settings' names in messages, with a dot at its end.
    """
    values = dict(settings(section, prefix))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, not {value}")
    for name, _, declared in declared_settings(type(section), prefix):
        value = values[name]
        if declared.choices and value not in declared.choices:
            raise ConfigError(f"{name}: unknown value '{value}'; {suggest(value, declared.choices)}")
        if fault := declared.fault(value):
            raise ConfigError(f"{name} {fault}")
