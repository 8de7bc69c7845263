"""`config.json` of a model's folder, read and checked before transformers reads it, which checks little.

Numbers that would make transformers use too much memory or time raise DataError. `understanding` turns errors of
transformers and of the families about a value of a wrong kind into one line.
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
# Upper bounds: transformers creates or reads lists of these lengths. sleeptrain does not use labels.
_LIMITS = {
    "num_hidden_layers": MOST_LAYERS,
    "layer_types": MOST_LAYERS,
    "num_labels": 2**16,
    "layers": MOST_LAYERS,
    "stop_gate_passes": 2**16,
}
_SECTIONS = ("text_config", "vision_config", "model")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder. Raises DataError: it cannot be read, or a number is too large."""
    path = folder / "config.json"
    config_dict = read_json(path, WAY_OUT)
    if not is_text(config_dict.get("model_type")):
        raise DataError(f"{path} names no model_type; {WAY_OUT}")
    check_amounts(path, config_dict)
    return config_dict


def check_amounts(path: Path, config_dict: Mapping[str, Any]) -> None:
    """Raises DataError: a number of layers or labels, or the length of such a list, is out of bounds."""
    for name, value in config_dict.items():
        amount = len(value) if isinstance(value, list | dict) else value
        limit = _LIMITS.get(name)
        if limit is not None and type(amount) in (int, float) and not 0 <= amount <= limit:
            raise DataError(f"{path}: {name} is or has {amount}, outside of 0 to {limit}; {WAY_OUT}")
        if name in _SECTIONS and value is not None:
            if not isinstance(value, dict):
                raise DataError(f"{path}: {name} is no object; {WAY_OUT}")
            check_amounts(path, value)


@contextmanager
def understanding(path: Path | str, what: str = "is not understood") -> Iterator[None]:
    """Turn exceptions in the block into a DataError that names the file: a value is missing or of a wrong kind."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers' classes raise exceptions of several packages
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path} {what}: a value is missing or of a wrong kind ({reason}); {WAY_OUT}") from error
