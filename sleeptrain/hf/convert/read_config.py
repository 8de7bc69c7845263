"""The model and the sleep settings in a folder's `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import ModelConfig, SleepConfig
from sleeptrain.config.validate import validate_model
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.card import read_sleep
from sleeptrain.hf.convert.config_file import read_config, understanding
from sleeptrain.hf.convert.gate_file import GATE_PASSES, check_gate, folder_gate
from sleeptrain.hf.convert.native import complete_config
from sleeptrain.hf.families import FAMILIES, Family, family_of
from sleeptrain.sleep.stop_gate import StopGate


@dataclass(frozen=True)
class Described:
    """The content of a `config.json`.

    family: the family that reads it.
    model_type: the value in the file.
    model: settings of the model.
    sleep: settings of sleep.
    gate: the gate of `sleep.stop=gate`; None under another rule.
    remarks: `Family.remarks`.
    """

    family: Family
    model_type: str
    model: ModelConfig
    sleep: SleepConfig
    gate: StopGate | None
    remarks: list[str]


def describe(folder: Path) -> Described:
    """Read `config.json`. Missing keys get transformers' defaults if transformers has the family.

    Raises UserError: the file or that of the gate cannot be read, a key is missing, or sleeptrain has no model with
    such a value.
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
        gate = folder_gate(folder, model.dim, written.get(GATE_PASSES)) if sleep.stop == "gate" else None
        check_gate(sleep, gate.most_passes if gate else 0)
    except ConfigError as error:
        raise DataError(f"{path} describes no model that sleeptrain has: {error}") from error
    return Described(family, written["model_type"], model, sleep, gate, remarks)
