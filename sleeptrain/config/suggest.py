"""Words for a name that is not one of those allowed: the nearest of them, or all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, allowed: Iterable[str]) -> str:
    """The second half of an error message: the allowed names, the nearest first where one is near."""
    names = list(allowed)
    listed = f"allowed: {', '.join(names)}"
    near = get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'? ({listed})" if near else listed


def suggest_setting(name: str, schema: type, groups: Iterable[str] = ()) -> str:
    """The same for a dotted setting of `schema`: those of that name elsewhere, else the nearest, else its section's.

    groups: further names that can stand before the `=`.
    """
    names = [*setting_names(schema), *groups]
    section, _, leaf = name.rpartition(".")
    elsewhere = [other for other in names if other.rpartition(".")[2] == leaf]
    prefix = f"{section}." if section else ""
    siblings = [other.removeprefix(prefix) for other in names if other.rpartition(".")[0] == section]
    longer = [other for other in siblings if leaf in other.split("_")]
    near = elsewhere or [prefix + other for other in get_close_matches(leaf, siblings, n=1) or longer]
    if near:
        return f"did you mean {' or '.join(repr(other) for other in near)}?"
    if siblings:
        return f"{section or 'a setting'} {'has' if section else 'begins with one of'} {', '.join(siblings)}"
    return "`sleeptrain train --help` lists the settings"


def setting_names(schema: type) -> list[str]:
    """Every dotted setting of a configuration dataclass, sections included, in its order."""
    names = []
    for item in dataclasses.fields(schema):
        names.append(item.name)
        # The default of a section is built by its own dataclass; other fields hold values or lists.
        section = item.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            names += [f"{item.name}.{below}" for below in setting_names(section)]
    return names
