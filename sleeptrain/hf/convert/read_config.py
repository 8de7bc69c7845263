"""The model that a folder's `config.json` describes, and how it sleeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import ModelConfig, SleepConfig
from sleeptrain.config.validate import validate_model
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.card import read_sleep
from sleeptrain.hf.convert.config_file import read_config, understanding
from sleeptrain.hf.convert.native import complete_config
from sleeptrain.hf.families import FAMILIES, Family, family_of


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
    written = read_config(folder)
    known = FAMILIES.get(written["model_type"])
    with understanding(path, f"is not that of a {written['model_type']} model"):
        complete = written if known and not known.in_transformers else complete_config(folder).to_dict()
        family = family_of(complete["model_type"])
        model = from_dict(ModelConfig, asdict(family.from_config(complete)), f"{path}: as a {family.model_type} model")
        remarks = family.remarks(complete)
    sleep = read_sleep(written)
    try:
        validate_model(model, sleep)
    except ConfigError as error:
        raise DataError(f"{path} describes no model that sleeptrain has: {error}") from error
    return Described(family, written["model_type"], model, sleep, remarks)
