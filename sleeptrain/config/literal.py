"""Settings read literally: `${...}` in them is text and is not resolved.

OmegaConf resolves interpolations whenever it converts a configuration to objects. In an untrusted file they could read
the environment of this process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from sleeptrain.small_files import parse_yaml

Section = TypeVar("Section")
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def escaped(value: Any) -> Any:
    """A value, or a list or mapping of values, with every `${` escaped so that OmegaConf reads the two characters."""
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda match: f"{2 * match[1]}\\${{", value)
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


def literal(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """The section with these values, and its defaults for missing ones. Raises OmegaConf's errors and ValueError."""
    return cast(Section, OmegaConf.to_object(OmegaConf.merge(_defaults(cast(Any, kind)), escaped(values))))


@lru_cache
def _defaults(kind: type) -> DictConfig:
    """The section's defaults, which `merge` copies."""
    return cast(DictConfig, OmegaConf.structured(kind))


def read_yaml(content: bytes) -> Any:
    """The values in a YAML file, with OmegaConf's rules for numbers and strings. Raises as `parse_yaml`."""
    return parse_yaml(content, get_yaml_loader())


def write_yaml(values: Mapping[str, Any]) -> bytes:
    """The content of a YAML file from which `read_yaml` reads these values back."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(values)), resolve=True).encode()
