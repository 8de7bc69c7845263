"""One declaration for each setting: its default, allowed values, meaning, and whether it may change on resume.

A setting is a field of a dataclass in `schema/`, made by `setting`. Range checks, suggestions, the comparison of
settings on resume, `--help` and docs/configuration.md read the declaration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

KEY = "setting"

# free: it may change whenever a run resumes. named: only if `run.allow_changes` names it. fixed: never, because tensors
# of a checkpoint have a shape that depends on it, or it describes the data of the saved position.
OnResume = Literal["free", "named", "fixed"]


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting besides its name, type and default.

    help: its meaning, one line of Markdown.
    choices: all allowed values; empty for any.
    at_least, above, at_most: bounds of a number; `above` is exclusive.
    allowed: the allowed values in words, if choices and bounds do not state them.
    on_resume: whether it may change when a run resumes.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    allowed: str = ""
    on_resume: OnResume = "named"

    def fault(self, value: Any) -> str | None:
        """The error in a value of the right type, as the end of a sentence that begins with the setting's name."""
        if value is None:
            return None
        if self.at_least is not None and self.at_most is not None:
            within = self.at_least <= value <= self.at_most
            return None if within else f"must lie between {self.at_least:g} and {self.at_most:g}, not {value}"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}, not {value}"
        if self.above is not None and value <= self.above:
            return f"must be greater than {self.above:g}, not {value}"
        return None


def setting(default: Any, help: str, **facts: Any) -> Any:
    """A field of a configuration dataclass. default: may be a list or dict. facts: further fields of `Setting`."""
    declared = {KEY: Setting(help, **facts)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=partial(deepcopy, default), metadata=declared)
    return dataclasses.field(default=default, metadata=declared)


def declared_settings(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Setting]]:
    """(dotted name, field, declaration) of each setting of a configuration dataclass, those of sections included."""
    for item in dataclasses.fields(schema):
        section = item.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            yield from declared_settings(section, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item, item.metadata[KEY]
