"""The tables of docs/configuration.md and the lines of `--help`, made from the declarations of the settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

from sleeptrain.config.schema import Config
from sleeptrain.config.setting import Setting, declared_settings

HEAD = "| setting | default | allowed | meaning |\n|---|---|---|---|\n"
# A marker in the page, and the generated table after it.
TABLE = re.compile(r"(<!-- settings: (\S+) -->\n)(?:\|.*\n)*")


def with_tables(page: str) -> str:
    """The page with a new table after each marker (`<!-- settings: sleep -->`), made from the declarations.

    A marker names a section of the settings, or the items of a list (`sleep.curriculum[]`). Raises KeyError for any
    other name.
    """
    return TABLE.sub(lambda match: match[1] + _table(match[2]), page)


def help_lines() -> Iterator[str]:
    """Every setting with its default, its meaning and its allowed values."""
    for name, field, declared in declared_settings(Config):
        allowed = _allowed(field, declared).replace("`", "")
        meaning = _plain(declared.help) + (f" ({allowed})" if allowed else "")
        yield f"  {name}={_default(field).strip('`')}\n      {meaning}"


def _table(section: str) -> str:
    rows = [
        f"| `{name}` | {_default(field)} | {_allowed(field, declared)} | {declared.help} |\n"
        for name, field, declared in _settings_of(section)
    ]
    return HEAD + "".join(rows)


def _settings_of(section: str) -> list[tuple[str, dataclasses.Field[Any], Setting]]:
    if section.endswith("[]"):
        return list(declared_settings(_item_class(section.removesuffix("[]")), f"{section}."))
    rows = [row for row in declared_settings(Config) if row[0].startswith(f"{section}.")]
    if not rows:
        raise KeyError(f"no section '{section}' of settings")
    return rows


def _item_class(name: str) -> type:
    """The dataclass of a list's items."""
    section: Any = Config
    *sections, leaf = name.split(".")
    for part in sections:
        section = get_type_hints(section)[part]
    (item,) = get_args(get_type_hints(section)[leaf])
    return item


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "required" if value == MISSING else f"`{_written(value)}`"


def _written(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return value or '""'
    return "null" if value is None else str(value)


def _allowed(field: dataclasses.Field[Any], declared: Setting) -> str:
    if declared.allowed:
        return declared.allowed
    if declared.choices:
        return ", ".join(f"`{choice}`" for choice in declared.choices)
    if declared.at_most is not None:
        return f"{declared.at_least:g} to {declared.at_most:g}"
    if declared.at_least is not None:
        return f">= {declared.at_least:g}"
    if declared.above is not None:
        return f"> {declared.above:g}"
    return "`true`, `false`" if field.type == "bool" else ""


def _plain(markdown: str) -> str:
    """The text without Markdown: links become their text, backticks are removed."""
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown).replace("`", "")
