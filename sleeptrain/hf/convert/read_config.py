"""The model that a folder's `config.json` describes, and how it sleeps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import ModelConfig, SleepConfig
from sleeptrain.config.validate import validate_model
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.card import read_sleep
from sleeptrain.hf.convert.native import complete_config
from sleeptrain.hf.families import FAMILIES, Family, family_of

# What code raises that expects a number, a list or a mapping, and finds something else.
_WRONG_KIND = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Described:
    """model_type: as it is written. remarks: of the family."""

    family: Family
    model_type: str
    model: ModelConfig
    sleep: SleepConfig
    remarks: list[str]


def describe(folder: Path) -> Described:
    """What `config.json` says, with transformers' defaults for what it leaves out of a family that transformers has.

    Raises UserError where it cannot be read, lacks something, or has a value that no model of ours has.
    """
    path = folder / "config.json"
    written = _read(path)
    known = FAMILIES.get(written["model_type"])
    try:
        complete = written if known and not known.in_transformers else complete_config(folder).to_dict()
        family = family_of(complete["model_type"])
        model = from_dict(ModelConfig, asdict(family.from_config(complete)), f"{path}: as a {family.model_type} model")
        remarks = family.remarks(complete)
    except _WRONG_KIND as error:
        raise DataError(
            f"{path} is not that of a {written['model_type']} model: a value is missing or of a wrong kind "
            f"({type(error).__name__}: {error})"
        ) from error
    sleep = read_sleep(written)
    try:
        validate_model(model, sleep)
    except ConfigError as error:
        raise DataError(f"{path} describes no model that sleeptrain has: {error}") from error
    return Described(family, written["model_type"], model, sleep, remarks)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name the folder of a model as transformers saves it") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise DataError(f"{path} names no model_type")
    return found
