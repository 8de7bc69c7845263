"""`config.json` of a model's folder as it is written, read before transformers reads it, which checks little.

Raises DataError for what would cost it more memory or time than there is, and turns what its classes and those of the
families raise over a value of a wrong kind into one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleeptrain.config.validate import MOST_LAYERS
from sleeptrain.errors import DataError, UserError
from sleeptrain.kinds import is_text
from sleeptrain.small_files import read_json

WAY_OUT = "name the folder of a model as transformers saves it"
# Transformers makes a list of as many entries, or goes through one; sleeptrain has no use for labels.
_MOST = {"num_hidden_layers": MOST_LAYERS, "layer_types": MOST_LAYERS, "num_labels": 2**16, "layers": MOST_LAYERS}
_SECTIONS = ("text_config", "vision_config", "model")


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a folder. Raises DataError where they cannot be read or are too many."""
    path = folder / "config.json"
    found = read_json(path, WAY_OUT)
    if not is_text(found.get("model_type")):
        raise DataError(f"{path} names no model_type; {WAY_OUT}")
    check_amounts(path, found)
    return found


def check_amounts(path: Path, found: Mapping[str, Any]) -> None:
    """Raises DataError for a number of layers, or of entries in a list of them, that no model has."""
    for name, value in found.items():
        amount = len(value) if isinstance(value, list | dict) else value
        most = _MOST.get(name)
        if most is not None and type(amount) in (int, float) and not 0 <= amount <= most:
            raise DataError(f"{path}: {name} is or has {amount}, outside of 0 to {most}; {WAY_OUT}")
        if name in _SECTIONS and value is not None:
            if not isinstance(value, dict):
                raise DataError(f"{path}: {name} is no object; {WAY_OUT}")
            check_amounts(path, value)


@contextmanager
def understanding(path: Path | str, what: str = "is not understood") -> Iterator[None]:
    """What is raised over a value of a wrong kind becomes a DataError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the classes of transformers raise errors of several packages
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path} {what}: a value is missing or of a wrong kind ({reason}); {WAY_OUT}") from error
