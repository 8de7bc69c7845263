"""Configurations with some settings changed."""

from __future__ import annotations

from typing import Any, TypeVar

Settings = TypeVar("Settings")


def change(config: Settings, changes: dict[str, Any]) -> Settings:
    """The same object, after setting each `section.setting` of `changes`; it must exist."""
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        assert hasattr(section, leaf), name
        setattr(section, leaf, value)
    return config
