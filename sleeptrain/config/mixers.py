"""Tables by mixer. A mixer that a table lacks is refused, never taken for another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from sleeptrain.errors import ConfigError

T = TypeVar("T")


def of_mixer(table: Mapping[str, T], kind: str, what: str) -> T:
    """The entry of a mixer. what: what the table holds, in words. Raises ConfigError where it has none."""
    if kind not in table:
        raise ConfigError(f"model.layers: {what} of the mixer '{kind}' is not known, only that of {', '.join(table)}")
    return table[kind]
