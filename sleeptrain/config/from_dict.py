"""Settings that come from a file of somebody else's, as the dataclass that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf.errors import OmegaConfBaseException

from sleeptrain.config.literal import literal
from sleeptrain.errors import ConfigError

Section = TypeVar("Section")


def from_dict(kind: type[Section], given: Mapping[str, Any], source: str) -> Section:
    """The section with these values, its defaults for what is left out. source: what the message begins with.

    Raises ConfigError for a setting that the section lacks, and for a value of a wrong type.
    """
    try:
        return literal(kind, given)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error
