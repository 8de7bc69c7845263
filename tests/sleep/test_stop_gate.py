from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sleeptrain.errors import ConfigError
from sleeptrain.sleep.loop import LoopSettings
from sleeptrain.sleep.stop_gate import StopGate, load_gate, read_gate, save_gate
from sleeptrain.sleep.stop_rule import StopRule
from tests.models import tiny_model
from tests.sleep.gates import a_gate
from tests.sleep.test_until_stopped import PASSES, a_batch, run

CPU = torch.device("cpu")


def test_the_gain_is_that_of_the_best_number_of_further_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = a_gate()
    losses = torch.tensor([[1.0, 0.9, 0.2, 0.1], [0.5, 0.6, 0.7, 0.8]])
    monkeypatch.setattr(StopGate, "forward", lambda *_: losses)
    change_R, pooled_RD = torch.zeros(2), torch.zeros(2, 16)
    torch.testing.assert_close(gate.gain(pooled_RD, change_R, 1, 4), torch.tensor([0.4, -0.1]))
    torch.testing.assert_close(gate.gain(pooled_RD, change_R, 3, 4), torch.tensor([0.1, -0.1]))
    assert gate.gain(pooled_RD, change_R, 4, 4).tolist() == [-torch.inf] * 2


def test_flops_are_those_that_torch_counts() -> None:
    gate, rows = a_gate(), 5
    with FlopCounterMode(display=False) as counter:
        gate(torch.randn(rows, 16), torch.ones(rows), torch.ones(rows, dtype=torch.long))
    assert counter.get_total_flops() == rows * gate.flops


def test_rows_stop_alone_as_in_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    save_gate(a_gate(change_weight=1), path)
    model, batch = tiny_model(), a_batch()
    settings = LoopSettings((0, model.num_layers))

    def rule(threshold: float) -> StopRule:
        return StopRule("gate", threshold, 1, settings.core, str(path))

    all_passes = run(model, batch, rule(-10.0), settings, "every", "features")
    scores = torch.tensor([score for _, of_rows in all_passes.scores.values() for score in of_rows])
    middle = rule(float(scores.median()))
    batched = run(model, batch, middle, settings, "every", "features")
    assert len(set(itertools.chain.from_iterable(batched.passes_KB))) > 2
    for row in (0, 1, 2, 3, 5):  # row 4 has pads only
        alone = run(model, batch.rows(row, row + 1), middle, settings, "every", "features")
        assert [passes[0] for passes in alone.passes_KB] == [passes[row] for passes in batched.passes_KB]


def test_a_file_that_is_no_gate_or_that_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    with pytest.raises(ConfigError, match=r"sleep\.stop_gate=.*no gate that can be read"):
        load_gate(str(path), 16, 4, CPU)
    save_gate(a_gate(), path)
    assert load_gate(str(path), 16, 3, CPU).most_passes == PASSES
    with pytest.raises(ConfigError, match=r"width 16 and at most 4 passes, and the model has width 8"):
        load_gate(str(path), 8, 4, CPU)
    with pytest.raises(ConfigError, match=r"takes up to 5"):
        load_gate(str(path), 16, 5, CPU)


def bits(gate: StopGate) -> list[torch.Tensor]:
    return [p.view(torch.int32) for p in gate.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_gate_stays_fp32_when_the_model_that_holds_it_is_cast(dtype: torch.dtype) -> None:
    gate = a_gate()
    holder = nn.ModuleDict({"gate": gate, "other": nn.Linear(2, 2)}).to(dtype)
    assert holder["other"].weight.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(bits(gate), bits(a_gate()), strict=True))


def test_a_gate_is_read_back_bit_for_bit_in_fp32(tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    save_gate(a_gate(), path)
    found = read_gate(path)
    assert all(torch.equal(a, b) for a, b in zip(bits(found), bits(a_gate()), strict=True))
    assert not any(p.requires_grad for p in found.parameters())
    save_file({name: t.half() for name, t in load_file(path).items()}, path)
    assert {p.dtype for p in read_gate(path).parameters()} == {torch.float32}


DAMAGED = {
    "no batch of numbers": {"features.0.weight": torch.tensor(1.0)},
    "larger than its numbers": {"features.0.weight": torch.empty(2**50, 0)},
    "another width": {"features.0.weight": torch.ones(9)},
    "no network": {},
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_tensors_that_are_no_gate_are_refused_in_a_line(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "gate.safetensors"
    save_file(a_gate().state_dict() | change if change else {"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"\w") as refusal:
        read_gate(path)
    assert "\n" not in str(refusal.value)
