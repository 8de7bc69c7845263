"""Configurations with some settings changed."""

from __future__ import annotations

from typing import Any

from sleeptrain.config import Config


def change(config: Config, changes: dict[str, Any]) -> Config:
    """The same object, after setting each `section.setting` of `changes`; it must exist."""
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        assert hasattr(section, leaf), name
        setattr(section, leaf, value)
    return config
