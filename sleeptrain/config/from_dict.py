"""Settings from a file that need not be trusted, as their dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf.errors import OmegaConfBaseException

from sleeptrain.config.literal import literal
from sleeptrain.errors import ConfigError

Section = TypeVar("Section")


def from_dict(kind: type[Section], values: Mapping[str, Any], source: str) -> Section:
    """The section with these values, and its defaults for missing ones. source: where they come from, for the message.

    Raises ConfigError for a setting that the section lacks, and for a value of a wrong type.
    """
    try:
        return literal(kind, values)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error
