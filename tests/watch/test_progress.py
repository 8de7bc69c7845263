"""The reported place of a process is right: in every round, forward and backward, however rounds are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.rounds import Round, plan_batch
from sleeptrain.sleep.step import forward_backward, step_context
from sleeptrain.watch.progress import Location, Phase, Progress
from tests.models import random_batch, tiny_model
from tests.sleep.test_step import config

SHAPE = StepShape(passes=3, window=4, batch=2)
MODES = ("none", "block", "pass", "window")


class Probe(torch.autograd.Function):
    """The identity, which calls `callback` in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, callback: Callable[[], None]) -> torch.Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.callback()
        return grad, None


def rounds_of(batch: Batch, settings: Config) -> list[Round]:
    return plan_batch(batch, SHAPE.window, SHAPE.passes, settings.sleep)


def places(rounds: list[Round], phase: Phase) -> list[Location]:
    return [Location(5, phase, r.window + 1, r.pass_index) for r in rounds]


def probed(model: Hybrid, here: Progress) -> tuple[list[Location], list[tuple[Location, Location]]]:
    """The reported place at each block's forward; and at its backward, together with that of its forward."""
    forwards, backwards = list[Location](), list[tuple[Location, Location]]()

    def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        made_at = here.now
        forwards.append(made_at)
        if not inputs[0].requires_grad:
            return inputs
        return Probe.apply(inputs[0], lambda: backwards.append((made_at, here.now))), *inputs[1:]

    for block in model.blocks.values():
        block.register_forward_pre_hook(hook)
    return forwards, backwards


@pytest.mark.parametrize("bptt", [None, 1])
@pytest.mark.parametrize("feedback", ["features", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("core", [None, [1, 2]])
def test_forward_and_backward_name_the_round_they_run(
    mode: str, feedback: str, bptt: int | None, core: list[int] | None
) -> None:
    """With a core, sleep passes pass the memory of prelude and coda on."""
    model, here = tiny_model(["mamba2", "gated_deltanet", "mamba2"]), Progress()
    batch = random_batch([[0] * 12, [0] * 5 + [1] * 7], continues=[True, False])
    settings = config(sleep__recompute=mode, sleep__feedback=feedback, sleep__bptt_windows=bptt, sleep__core=core)
    forwards, backwards = probed(model, here)
    here.begin_step(5)
    forward_backward(step_context(settings, SHAPE, model, here), model, batch, SHAPE, None)
    rounds = rounds_of(batch, settings)
    assert list(dict.fromkeys(f for f in forwards if f.phase == Phase.FORWARD)) == places(rounds, Phase.FORWARD)
    assert backwards
    for made_at, found in backwards:  # a recomputed round is at the same place, in the backward
        assert found.phase == Phase.BACKWARD and found[2:] == made_at[2:], (made_at, found)
    # No gradient reaches rounds after the last loss of a backward.
    trained = {found for _, found in backwards}
    losses = [i for i, r in enumerate(rounds) if r.loss]
    assert trained >= set(places([rounds[i] for i in losses], Phase.BACKWARD))
    if bptt is None:
        assert trained == set(places(rounds[: losses[-1] + 1], Phase.BACKWARD))
    recomputed = [f for f in forwards if f.phase == Phase.BACKWARD]
    assert bool(recomputed) == (mode != "none")
    assert here.now.phase == Phase.BACKWARD


@pytest.mark.parametrize("mode", MODES)
def test_reporting_progress_changes_no_gradient(mode: str) -> None:
    batch, found = random_batch([[0] * 12, [0] * 12], continues=[True, True]), []
    for here in (None, Progress()):
        model = tiny_model()
        context = step_context(config(sleep__recompute=mode), SHAPE, model, here)
        loss = forward_backward(context, model, batch, SHAPE, None).loss
        found.append([torch.tensor(loss), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_phases_that_may_take_long() -> None:
    here = Progress()
    assert here.long and str(here.now) == "the start"
    here.begin_step(12)
    assert here.long, "kernels are compiled in the first step"
    here.begin_step(13)
    assert not here.long and str(here.now) == "step 13, reading"
    here.begin(Phase.BACKWARD)
    here.at(Round(2, 8, 12, 3, (0,)))
    assert str(here.now) == "step 13, window 3, pass 3, backward" and not here.long
    moves = here.moves
    here.begin(Phase.SAVING)
    assert here.long and here.moves == moves + 1 and str(here.now) == "step 13, saving"
