"""Paths that settings name, and what the system says against them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sleeptrain.config.schema import Config
from sleeptrain.errors import DataError, path_error


@contextmanager
def naming_settings(config: Config) -> Iterator[None]:
    """An OSError about a path becomes a DataError, which names the setting that the path is of, if one is."""
    try:
        yield
    except OSError as error:
        if (told := path_error(error)) is None:
            raise
        inside = f"{error.filename}/"
        places = [(len(text), name) for name, text in strings(asdict(config)) if text and inside.startswith(f"{text}/")]
        raise DataError(f"{max(places)[1]}: {told}" if places else str(told)) from error


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every string setting, those in lists included."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield from strings(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inside in enumerate(value):
            yield from strings(inside, f"{name}[{index}]")
