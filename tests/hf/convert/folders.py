"""Folders of models as transformers saves them, changes of them, and their refusal by an import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.importing import import_folder
from sleeptrain.hf.families import family_of
from tests.hf.models import MODELS, disturbed, native


def native_folder(name: str, place: Path) -> None:
    place.mkdir()
    model_type, config = MODELS[name]
    native(family_of(model_type), disturbed(config), place)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path) -> DataError | ConfigError:
    """The error of the import, which leaves no files."""
    with pytest.raises((DataError, ConfigError)) as error:
        import_folder(folder, folder.parent / "out", check_tokens=16)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return error.value


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
