"""The gate of `sleep.stop=gate` in an exported folder: a file beside the weights, which transformers does not read.

It lies in a folder of its own, for engines read all safetensors files beside `config.json` as weights. `config.json`
says under GATE_PASSES how many passes the gate knows, so that a model can be built before its weights are read.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.plain_files import named_file
from sleeptrain.sleep.stop_gate import StopGate, load_gate, read_gate, save_gate

GATE_FILE = "sleep/gate.safetensors"
GATE_PASSES = "stop_gate_passes"  # key of config.json
WAY_OUT = "export the run again, or take the file from where the folder comes from"


def run_gate(sleep: SleepConfig, dim: int, passes: int) -> StopGate | None:
    """A copy of the gate that a run's `sleep.stop_gate` names, on the CPU; None under another rule.

    dim: D of the model. passes: N of the export. Raises ConfigError: see `load_gate`.
    """
    if sleep.stop != "gate":
        return None
    return deepcopy(load_gate(sleep.stop_gate, dim, passes, torch.device("cpu")))


def write_gate(folder: Path, gate: StopGate) -> None:
    """Write the gate's file into an exported folder, or into a checkpoint that was imported from one."""
    save_gate(gate, folder / GATE_FILE)


def folder_gate(folder: Path, dim: int, passes: Any) -> StopGate:
    """The gate of an exported folder, fp32 on the CPU. dim: D of the model. passes: the value of GATE_PASSES.

    Raises DataError: the file is missing, damaged, no plain file of the folder, or not the gate that `config.json`
    describes.
    """
    path = named_file(folder, GATE_FILE, folder / "config.json")
    if not path.is_file():
        raise DataError(f"{path} is missing, the gate of sleep.stop=gate in config.json; {WAY_OUT}")
    try:
        gate = read_gate(path)
    except ValueError as error:
        raise DataError(f"{path}, the gate of sleep.stop=gate, cannot be read ({error}); {WAY_OUT}") from error
    if (gate.dim, gate.most_passes) != (dim, passes):
        raise DataError(
            f"{path} is a gate for width {gate.dim} and {gate.most_passes} passes, and config.json describes one for "
            f"width {dim} and {GATE_PASSES}={passes}; {WAY_OUT}"
        )
    return gate


def check_gate(sleep: SleepConfig, gate_passes: int) -> None:
    """Raises ConfigError: `sleep.stop=gate` without a gate (gate_passes: 0), or with more passes than it knows."""
    if sleep.stop != "gate":
        return
    if not gate_passes:
        raise ConfigError(
            "sleep.stop=gate: this model holds no gate; export a run with sleep.stop=gate and sleep.stop_gate, or use "
            "sleep.stop=change or acceleration"
        )
    if sleep.passes > gate_passes:
        raise ConfigError(
            f"sleep.passes={sleep.passes}: the gate of sleep.stop=gate knows at most {gate_passes}; take no more, or "
            "use sleep.stop=change or acceleration"
        )
