"""The gate's file in an exported folder: missing, damaged or another model's, it is refused with the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.gate_file import GATE_FILE, check_gate, folder_gate, run_gate, write_gate
from sleeptrain.sleep.stop_gate import StopGate, load_gate, save_gate
from tests.sleep.gates import PASSES, a_gate

DIM = 16


def equal_bits(a: StopGate, b: StopGate) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p.view(torch.int32), q.view(torch.int32)) for p, q in pairs)


def test_the_file_gives_the_gate_back_bit_for_bit(tmp_path: Path) -> None:
    write_gate(tmp_path, a_gate())
    assert equal_bits(folder_gate(tmp_path, DIM, PASSES), a_gate())
    assert [path.name for path in tmp_path.iterdir()] == ["sleep"], "no file beside the weights"


def test_the_gate_of_a_run_is_a_copy(tmp_path: Path) -> None:
    path = str(tmp_path / "gate.safetensors")
    save_gate(a_gate(), Path(path))
    gate = run_gate(SleepConfig(stop="gate", stop_gate=path), DIM, 3)
    assert gate is not None and equal_bits(gate, a_gate())
    assert gate is not load_gate(path, DIM, 3, torch.device("cpu")), "moving the model would move that of others"
    assert run_gate(SleepConfig(stop="change", stop_gate=path), DIM, 3) is None
    with pytest.raises(ConfigError, match=r"sleep\.stop_gate=.* takes up to 5: fit one with sleeptrain calibrate"):
        run_gate(SleepConfig(stop="gate", stop_gate=path), DIM, 5)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / GATE_FILE
    with pytest.raises(
        DataError, match=r"gate\.safetensors is missing, the gate of sleep\.stop=gate.*; export the run"
    ):
        folder_gate(tmp_path, DIM, PASSES)
    write_gate(tmp_path, a_gate())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"sleep\.stop=gate, cannot be read \(.+\); export the run again") as refusal:
        folder_gate(tmp_path, DIM, PASSES)
    assert "\n" not in str(refusal.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="is no plain file"):
        folder_gate(tmp_path, DIM, PASSES)


@pytest.mark.parametrize(
    ("dim", "passes", "message"),
    [
        (8, PASSES, "a gate for width 16 and 4 passes, and config.json .* width 8 and stop_gate_passes=4; export"),
        (DIM, 3, "stop_gate_passes=3"),
        (DIM, None, "stop_gate_passes=None"),
    ],
)
def test_a_gate_that_config_json_does_not_describe_is_refused(
    dim: int, passes: object, message: str, tmp_path: Path
) -> None:
    write_gate(tmp_path, a_gate())
    with pytest.raises(DataError, match=message):
        folder_gate(tmp_path, dim, passes)


def test_passes_that_the_gate_does_not_know_are_refused() -> None:
    for sleep in (SleepConfig(passes=9), SleepConfig(passes=9, stop="change"), SleepConfig(passes=4, stop="gate")):
        check_gate(sleep, 4 if sleep.stop == "gate" else 0)
    with pytest.raises(ConfigError, match=r"sleep\.passes=5: .* at most 4; take no more, or use sleep\.stop=change"):
        check_gate(SleepConfig(passes=5, stop="gate"), 4)
    with pytest.raises(ConfigError, match=r"sleep\.stop=gate: this model holds no gate; export a run with"):
        check_gate(SleepConfig(passes=2, stop="gate"), 0)
