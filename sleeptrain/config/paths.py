"""Errors of paths that settings name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sleeptrain.config.schema import Config
from sleeptrain.errors import DataError, path_error


@contextmanager
def naming_settings(config: Config) -> Iterator[None]:
    """Turn an OSError about a path into a DataError, which names the setting that holds the path, if there is one."""
    try:
        yield
    except OSError as error:
        if (message := path_error(error)) is None:
            raise
        path = f"{error.filename}/"
        matches = [(len(text), name) for name, text in strings(asdict(config)) if text and path.startswith(f"{text}/")]
        raise DataError(f"{max(matches)[1]}: {message}" if matches else str(message)) from error


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every string setting, those in lists included."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{name}[{index}]")
