"""Settings as words of a command line: quoted for hydra's grammar of overrides, and then for the shell.

Every command that sleeptrain prints or starts is put together here, so that any name of a folder or run can stand in
it: with spaces, commas, quotes, `=`, or letters beyond ASCII.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from sleeptrain.config.literal import escaped

# What hydra reads as a string without quotes. Its names have ASCII letters only.
PLAIN = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
OTHER_TYPES = ("null", "true", "false", "nan", "inf")


def override(name: str, value: Any) -> str:
    """`name=value`, one word of the arguments of `sleeptrain train`; not yet quoted for a shell."""
    return f"{name}={written(value)}"


def shell_command(*words: Any) -> str:
    """The words as a line that a shell takes apart into the same words."""
    return shlex.join(map(str, words))


def written(value: Any) -> str:
    """A value (None, bool, number, string, or a list or dict of them) in the grammar of hydra's overrides.

    No `${...}` in it is looked up when it is composed.
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
    from hydra.core.override_parser.types import Quote, QuotedString  # not above: commands without settings start fast

    return QuotedString(escaped(text), Quote.double).with_quotes()
