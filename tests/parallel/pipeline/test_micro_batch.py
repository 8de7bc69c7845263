"""A micro-batch on a single stage that holds the whole model, against the training loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import Boundary, FastWeights
from sleeptrain.parallel.pipeline.executor import StageStep
from sleeptrain.parallel.pipeline.micro_batch import RoundOutputs, StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep import round_layouts
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_rounds, window_facts, windows_of
from tests.models import random_batch, tiny_model

LAYERS = ["gated_deltanet", "attention"]
SETTINGS = LoopSettings((0, 2))
BATCH = random_batch([[0] * 12, [0] * 5 + [1] * 7])
DIVISOR = 7.0


def planned(passes: int = 2) -> list[Round]:
    return plan_rounds(window_facts(BATCH, 4), passes)


def micro_batch(model: Hybrid, rounds: list[Round], detached: frozenset[int] = frozenset()) -> StageMicroBatch:
    return StageMicroBatch(model, BATCH, rounds, model.empty_state(), SETTINGS, DIVISOR, detached)


def run(part: StageMicroBatch) -> None:
    stages = PipelineStages((0, 2), tuple(LAYERS), (0, 2))
    StageStep(schedule([part.rounds], stages), 0, [part], None, 16).run(lambda loss: loss.backward())


def gradients(model: Hybrid) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("passes", [1, 3])
def test_loss_gradients_and_memory_are_those_of_the_loop(passes: int) -> None:
    model, other, rounds = tiny_model(LAYERS), tiny_model(LAYERS), planned(passes)
    part = micro_batch(model, rounds)
    run(part)
    losses, state = run_rounds(other, BATCH, rounds, other.empty_state(), SETTINGS)
    loss = torch.stack(list(losses.values())).sum() / DIVISOR
    loss.backward()
    assert float(part.loss) == pytest.approx(float(loss.detach()))
    assert_same(gradients(model), gradients(other))
    assert_same(part.state.to_state_dict(), state.detach().to_state_dict())


def test_attention_by_bounds_reads_the_documents_of_carried_memory(
    by_bounds: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under sliding eviction, against the loop under masks, over two steps."""
    rows, settings = [[0] * 6 + [1] * 6, [2] * 12], replace(SETTINGS, boundary=Boundary(sliding_window=4))
    first, second = random_batch(rows, continues=[True, True]), random_batch([[1] * 5 + [3] * 7, [2] * 12], 1)
    second = replace(second, carried_B=torch.tensor([True, True]))
    model, other = tiny_model(LAYERS), tiny_model(LAYERS)
    plans = [plan_rounds(window_facts(batch, 4), 2) for batch in (first, second)]
    memory = model.empty_state()
    for batch, rounds in zip((first, second), plans, strict=True):
        part = StageMicroBatch(model, batch, rounds, memory, settings, DIVISOR)
        run(part)
        memory = part.state
    assert len(by_bounds) >= 8
    monkeypatch.setattr(round_layouts, "reads_bounds", lambda model: False)
    state = other.empty_state()
    for batch, rounds in zip((first, second), plans, strict=True):
        losses, state = run_rounds(other, batch, rounds, state.detach(), settings)
        (torch.stack(list(losses.values())).sum() / DIVISOR).backward()
    assert_same(gradients(model), gradients(other))
    assert_same(memory.to_state_dict(), state.detach().to_state_dict())


def test_backpropagation_ends_before_a_detached_round() -> None:
    """The gradients equal those of a loop that detaches the state at each window."""
    model, other, rounds = tiny_model(LAYERS), tiny_model(LAYERS), planned()
    begins = frozenset(i for i, r in enumerate(rounds) if r.is_wake and i and r.window != rounds[i - 1].window)
    assert len(begins) == 2
    run(micro_batch(model, rounds, begins))
    state: FastWeights = other.empty_state()
    for window in windows_of(rounds):
        losses, state = run_rounds(other, BATCH, window, state.detach(), SETTINGS)
        if losses:
            (torch.stack(list(losses.values())).sum() / DIVISOR).backward()
    assert_same(gradients(model), gradients(other))
    undetached = tiny_model(LAYERS)
    run(micro_batch(undetached, rounds))
    assert any(not torch.allclose(p, gradients(undetached)[name]) for name, p in gradients(model).items())


def test_a_forward_builds_no_graph_and_keeps_its_inputs_for_one_backward() -> None:
    model, rounds = tiny_model(LAYERS), planned(passes=1)
    part = micro_batch(model, rounds)
    outputs = part.forward(0, (), trained=True)
    assert outputs.loss is not None and not outputs.loss.requires_grad
    assert part.backward(0, RoundOutputs(), lambda loss: loss.backward()) == ()
    with pytest.raises(KeyError):
        part.backward(0, RoundOutputs(), lambda loss: loss.backward())
    untrained = micro_batch(model, rounds)
    untrained.forward(0, (), trained=False)
    with pytest.raises(KeyError):
        untrained.backward(0, RoundOutputs(), lambda loss: loss.backward())
