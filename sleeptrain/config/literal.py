"""Settings whose text is text: no `${...}` in them is looked up.

OmegaConf resolves interpolations wherever it makes objects of what it holds. In a file that may be somebody else's they
would read this process's environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from sleeptrain.small_files import parse_yaml

Section = TypeVar("Section")
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def escaped(value: Any) -> Any:
    """A value, a list or a mapping of them, with every `${` written as OmegaConf reads it for the two characters."""
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda found: f"{2 * found[1]}\\${{", value)
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


def literal(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """The section with these values, and its defaults for what is left out. Raises what OmegaConf does, ValueError."""
    return cast(Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), escaped(values))))


def read_yaml(content: bytes) -> Any:
    """The values in a YAML file, as OmegaConf takes numbers and texts apart. Raises as `parse_yaml`."""
    return parse_yaml(content, get_yaml_loader())


def write_yaml(values: Mapping[str, Any]) -> bytes:
    """The file from which `read_yaml` reads these values back."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(values)), resolve=True).encode()
