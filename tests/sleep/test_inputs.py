"""Inputs of rounds: made ahead of the rounds, sent in one copy, and nothing read back from the device in a round."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import SleepConfig, TrainConfig
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.ops.device import as_on_gpu
from sleeptrain.plan.roofline.waits import makes_the_host_wait
from sleeptrain.sleep import inputs as inputs_module
from sleeptrain.sleep import loop
from sleeptrain.sleep.inputs import inputs_of_rounds, packed, row_index
from sleeptrain.sleep.loop import loop_settings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.round_layouts import RoundLayouts, reads_bounds
from sleeptrain.sleep.rounds import plan_batch
from tests.models import random_batch, tiny_model
from tests.ops.stand_in import ZerosForKernels

CPU = torch.device("cpu")
WINDOW = 6
KINDS = ["attention", "sliding_attention", "gated_deltanet", "jet", "mamba2"]


class Waits(TorchDispatchMode):
    """Records the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if makes_the_host_wait(name, args, kwargs):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def documents() -> Batch:
    """Two documents in a window, pads, and a document that goes on."""
    rows = [[0] * 4 + [1] * 8 + [PAD] * 2, [2] * 14, [3] * 6 + [4] * 3 + [5] * 5]
    return random_batch(rows, continues=[False, True, True])


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize(
    ("kind", "kernels"),
    [*product(KINDS, ["", "fp32"]), ("attention", "bf16"), ("sliding_attention", "bf16")],
)
def test_a_round_reads_nothing_back(kind: str, eviction: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels: the precision of a run as on a GPU, without the kernels' own work; then no tensor is made of Python
    numbers either. In bf16 attention reads the bounds of documents."""
    batch, waits, run_window = documents(), Waits(), loop.run_window
    sleep = SleepConfig(window=WINDOW, passes=3, when="every", eviction=eviction)

    def watched(*args: Any) -> Any:
        with waits:
            return run_window(*args)

    monkeypatch.setattr(loop, "run_window", watched)
    model = tiny_model([kind, "gated_deltanet"]).float()
    rounds = plan_batch(batch, WINDOW, 3, sleep)
    settings = loop_settings(sleep, WINDOW, 2, recompute="none")
    with ExitStack() as stack:
        if kernels:
            stack.enter_context(as_on_gpu())
            stack.enter_context(ZerosForKernels())
            stack.enter_context(in_precision(TrainConfig(tokens=1, precision=kernels), model))
        assert reads_bounds(model) == (kernels == "bf16" or "attention" not in kind)
        losses, state = run_rounds(model, batch, rounds, model.empty_state(), settings)
        read = [t.sum() for t in state.to_state_dict().values() if t.is_floating_point()]
        total = torch.stack([*losses.values(), *read]).sum()
        with waits:
            total.backward()
    assert [name for name in waits.found if kernels or name != "lift_fresh"] == []


def test_the_watch_sees_what_waits() -> None:
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for call in (lambda: x.nonzero(), lambda: float(x[0]), lambda: x[mask], lambda: torch.tensor([1])):
        with Waits() as waits:
            call()
        assert waits.found


def test_tensors_are_sent_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a GPU; here the CPU stands for it."""
    batch = documents()
    rounds = plan_batch(batch, WINDOW, 3, SleepConfig(window=WINDOW, passes=3, when="every"))
    expected = inputs_of_rounds(batch, rounds, RoundLayouts(batch, tiny_model()), CPU)
    copies: list[int] = []
    monkeypatch.setattr(
        inputs_module, "packed", lambda tensors, device: copies.append(len(tensors)) or packed(tensors, CPU)
    )
    found = inputs_module._sent(expected, CPU)
    assert len(copies) == 1 and copies[0] > 20
    for a, b in zip(found, expected, strict=True):
        assert a.source_rows == b.source_rows
        leaves_a, leaves_b = tree_leaves(a), tree_leaves(b)
        assert len(leaves_a) == len(leaves_b)
        for x, y in zip(leaves_a, leaves_b, strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype if isinstance(y, torch.Tensor) else x == y


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.empty(0, dtype=torch.long)],
        [torch.arange(5), torch.tensor(True), torch.tensor([[True, False]]), torch.arange(6.0).view(2, 3).t()],
    ],
    ids=len,
)
def test_packed_tensors_are_the_same(tensors: list[torch.Tensor]) -> None:
    for found, expected in zip(packed(tensors, CPU), tensors, strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype and found.is_contiguous()


def test_rows_are_found_in_the_features_before() -> None:
    assert row_index((0, 1, 2), (0, 1, 2)) is None
    index = row_index((2, 0, 1), (0, 2))
    assert index is not None and index.tolist() == [1, 0]
    batch = documents()
    rounds = plan_batch(batch, WINDOW, 3, SleepConfig(window=WINDOW, passes=3, when="unlabelled"))
    layouts = RoundLayouts(batch, tiny_model())
    for r, inputs in zip(rounds, inputs_of_rounds(batch, rounds, layouts, CPU), strict=True):
        assert r.is_wake == (inputs.source_rows == ())
        if not r.is_wake:
            index = inputs.source_index_R
            rows = inputs.source_rows if index is None else [inputs.source_rows[i] for i in index.tolist()]
            assert tuple(rows) == r.rows
