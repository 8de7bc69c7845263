"""Environment variables in the settings that may hold a secret: they are read where the setting is used, not before.

Those settings are `train` and `validation` of `data.shards.sources`: URLs and commands, which may need a key. Their
`${oc.env:NAME}` stays as it is written in the configuration, and so in all that shows or keeps it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sleeptrain.errors import ConfigError
from sleeptrain.terminal import hide_credentials

SECRET = ("train", "validation")
SHORTEST_SECRET = 4  # characters; to replace shorter values would garble messages, and hide nothing
_BEGIN = "${oc.env:"
_VARIABLE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(?:,([^{}]*))?\}")
_UNESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)(?=\$\{oc\.env:)")


def keep_variables(settings: Mapping[str, Any]) -> None:
    """Escapes the variables in these settings, not yet resolved, so that OmegaConf leaves them as they are."""
    found: Any = settings
    for key in ("data", "shards", "sources"):
        found = found.get(key) if isinstance(found, Mapping) else None
    for source in found if isinstance(found, list) else ():
        for name in SECRET:
            if isinstance(source, dict) and isinstance(source.get(name), str):
                source[name] = _UNESCAPED.sub(r"\1\\", source[name])


@dataclass(frozen=True)
class Expanded:
    """A setting with its variables: text, as it is written; value, as it is used. Messages go through `hide`."""

    text: str
    value: str = field(repr=False)
    _secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def hide(self, message: str) -> str:
        """The message with the variables' names in the place of their values, and without credentials in URLs."""
        for value, name in self._secrets.items():
            message = message.replace(value, name)
        return hide_credentials(message)


def has_variables(text: str) -> bool:
    return _BEGIN in text


def expand(text: str) -> Expanded:
    """Reads the variables that a setting names. Raises ConfigError where one is not set and has no default."""
    secrets: dict[str, str] = {}

    def read(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        value = os.environ.get(name, None if default is None else default.strip().strip("'\""))
        if value is None:
            raise ConfigError(f"{hide_credentials(text)}: the environment variable {name} is not set")
        if name in os.environ and len(value) >= SHORTEST_SECRET:
            secrets[value] = found[0]
        return value

    if has_variables(_VARIABLE.sub("", text)):
        raise ConfigError(f"{hide_credentials(text)}: write {_BEGIN}NAME}} or {_BEGIN}NAME,default}}, none in another")
    value = _VARIABLE.sub(read, text)
    return Expanded(text, value, dict(sorted(secrets.items(), key=lambda pair: -len(pair[0]))))
