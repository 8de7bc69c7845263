"""Environment variables in settings that may hold a secret. They are read only when the setting is used.

These settings are `train` and `validation` of `data.shards.sources`: URLs and commands, which may need a key. Their
`${oc.env:NAME}` stays unresolved in the configuration, and so in every file and log that contains it.
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
SHORTEST_SECRET = 4  # characters; replacing shorter values would garble messages and hide nothing
_BEGIN = "${oc.env:"
_VARIABLE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(?:,([^{}]*))?\}")
_UNESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)(?=\$\{oc\.env:)")


def keep_variables(settings: Mapping[str, Any]) -> None:
    """Escape, in place, the variables of secret settings that are not yet resolved, so that OmegaConf keeps them."""
    sources: Any = settings
    for key in ("data", "shards", "sources"):
        sources = sources.get(key) if isinstance(sources, Mapping) else None
    for source in sources if isinstance(sources, list) else ():
        for name in SECRET:
            if isinstance(source, dict) and isinstance(source.get(name), str):
                source[name] = _UNESCAPED.sub(r"\1\\", source[name])


@dataclass(frozen=True)
class Expanded:
    """A setting with variables. Messages about it go through `hide`.

    text: the setting as the user wrote it.
    value: the setting with the variables' values.
    """

    text: str
    value: str = field(repr=False)
    _secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def hide(self, message: str) -> str:
        """The message with the variables' names instead of their values, and without credentials in URLs."""
        for value, name in self._secrets.items():
            message = message.replace(value, name)
        return hide_credentials(message)


def has_variables(text: str) -> bool:
    return _BEGIN in text


def expand(text: str) -> Expanded:
    """Read the variables that a setting names. Raises ConfigError if one is not set and has no default."""
    secrets: dict[str, str] = {}

    def read(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        value = os.environ.get(name, None if default is None else default.strip().strip("'\""))
        if value is None:
            raise ConfigError(f"{hide_credentials(text)}: the environment variable {name} is not set")
        if name in os.environ and len(value) >= SHORTEST_SECRET:
            secrets[value] = match[0]
        return value

    if has_variables(_VARIABLE.sub("", text)):
        raise ConfigError(f"{hide_credentials(text)}: write {_BEGIN}NAME}} or {_BEGIN}NAME,default}}, not nested")
    value = _VARIABLE.sub(read, text)
    return Expanded(text, value, dict(sorted(secrets.items(), key=lambda pair: -len(pair[0]))))
