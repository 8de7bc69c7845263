"""The hint in an error message about an unknown name: the nearest allowed name, or all allowed names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, allowed: Iterable[str]) -> str:
    """The second half of an error message: the nearest allowed name, if one is near, and all allowed names."""
    names = list(allowed)
    listed = f"allowed: {', '.join(names)}"
    near = get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'? ({listed})" if near else listed


def suggest_setting(name: str, schema: type, groups: Iterable[str] = ()) -> str:
    """The hint for an unknown dotted setting of `schema`.

    It lists the settings of that name in other sections, else the nearest name, else all names of its section. groups:
    further names that may stand to the left of `=`.
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
    """The dotted names of all sections and settings of a configuration dataclass, in order."""
    names = []
    for item in dataclasses.fields(schema):
        names.append(item.name)
        # The default factory of a section is its dataclass; other fields hold values or lists.
        section = item.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            names += [f"{item.name}.{below}" for below in setting_names(section)]
    return names
