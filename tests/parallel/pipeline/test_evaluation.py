"""Evaluation through a pipeline: the forwards of a schedule and nothing else."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.parallel.pipeline.evaluation import EvaluationMicroBatch, forwards_of
from sleeptrain.parallel.pipeline.executor import StageStep
from sleeptrain.parallel.pipeline.graph import Kind
from sleeptrain.parallel.pipeline.schedule import Backward, Forward, Receive, Send, schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import plan_rounds, window_facts
from tests.models import random_batch, tiny_model
from tests.parallel.pipeline.cases import even_stages, plan


@pytest.mark.parametrize("blocking", [False, True])
def test_backwards_and_gradients_are_omitted_and_the_rest_keeps_its_order(blocking: bool) -> None:
    made = schedule([plan(3, 2)] * 4, even_stages(3))
    forwards = forwards_of(made)
    for before, after in zip(made.ranks, forwards.ranks, strict=True):
        assert not any(isinstance(action, Backward) for action in after)
        assert all(a.message.kind is Kind.FEATURES for a in after if isinstance(a, Send | Receive))
        assert [a for a in after if isinstance(a, Forward)] == [a for a in before if isinstance(a, Forward)]
        kept = set(after)
        assert [action for action in before if action in kept] == list(after)
    simulation = simulate(forwards, blocking_receives=blocking, rendezvous_sends=blocking)
    assert len(simulation.spans) == 3 * 4 * len(plan(3, 2)), "no rank waits for what is left out"


def test_each_window_has_the_summed_loss_of_the_loop() -> None:
    model, settings = tiny_model(["gated_deltanet", "attention"]), LoopSettings((0, 2))
    batch = random_batch([[0] * 12, [0] * 5 + [1] * 3 + [-1] * 4])
    rounds = plan_rounds(window_facts(batch, 4), 2)
    part = EvaluationMicroBatch(model, batch, rounds, model.empty_state(), settings, 1.0)
    stages = PipelineStages((0, 2), ("gated_deltanet", "attention"), (0, 2))
    StageStep(forwards_of(schedule([rounds], stages)), 0, [part], None, 16).run(lambda loss: pytest.fail("a backward"))
    with torch.no_grad():
        losses, _ = run_rounds(model, batch, rounds, model.empty_state(), settings)
    assert part.losses.keys() == losses.keys() == {0, 1, 2}
    for window, loss in losses.items():
        torch.testing.assert_close(part.losses[window], loss)
    assert not any(loss.requires_grad for loss in part.losses.values())


def test_the_losses_of_several_rounds_of_a_window_are_added() -> None:
    """One window that predicts, run twice."""
    model = tiny_model(["gated_deltanet", "attention"])
    batch = random_batch([[0] * 4])
    rounds = plan_rounds(window_facts(batch, 4), 1)
    part = EvaluationMicroBatch(model, batch, rounds, model.empty_state(), LoopSettings((0, 2)), 1.0)
    once = part.forward(0, (), trained=True).loss
    assert once is not None
    torch.testing.assert_close(part.losses[0], once)
    again = part.forward(0, (), trained=True).loss
    assert again is not None
    torch.testing.assert_close(part.losses[0], once + again)
