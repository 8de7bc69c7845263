"""The check that a saved position in the data belongs to the same data and settings."""

from __future__ import annotations

from typing import Any

from sleeptrain.errors import DataError


def check_position(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises DataError, naming the first difference, unless `state` holds every entry of `identity`."""
    for name, value in identity.items():
        if state.get(name) != value:
            raise DataError(
                f"the saved position in the data has {name}={state.get(name)}, this run has {name}={value}: "
                "resume with the settings and data it was saved with, or start a new run"
            )
