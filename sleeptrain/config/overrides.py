"""Settings as words of a command line, quoted for hydra's grammar of overrides and then for the shell.

Every command that sleeptrain prints or starts is built here, so that names of folders and runs may hold spaces, commas,
quotes, `=` and letters beyond ASCII.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from sleeptrain.config.literal import escaped

# Text that hydra reads as a string without quotes. Hydra's grammar allows ASCII letters only.
PLAIN = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
OTHER_TYPES = ("null", "true", "false", "nan", "inf")


def override(name: str, value: Any) -> str:
    """`name=value`, one argument of `sleeptrain train`, not yet quoted for a shell."""
    return f"{name}={written(value)}"


def shell_command(*words: Any) -> str:
    """The words as one line that a shell splits into the same words."""
    return shlex.join(map(str, words))


def written(value: Any) -> str:
    """A value (None, bool, number, string, or a list or dict of them) in the grammar of hydra's overrides.

    `${...}` in it is escaped, so that composition does not resolve it.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(v)}' for key, v in value.items())}}}"
    text = str(value)
    return text if PLAIN.fullmatch(text) and text.lower() not in OTHER_TYPES else _quoted(text)


def _quoted(text: str) -> str:
    # Imported here, so that commands without settings start fast.
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(escaped(text), Quote.double).with_quotes()
