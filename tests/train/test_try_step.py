"""One step, and the consequences of a failure."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.errors import NonFiniteError, SpikeError
from sleeptrain.health.rollbacks import Rollbacks
from sleeptrain.health.spikes import SpikeDetector
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.totals import StepFacts, step_totals
from sleeptrain.train.engine import LocalEngine
from sleeptrain.train.step_feed import StepInputs
from sleeptrain.train.try_step import StepFailure, handle_failure, try_step
from sleeptrain.watch.progress import Phase, Progress
from tests.checkpoint.worlds import alone
from tests.configs import change
from tests.models import VOCABULARY, random_batch

SPIKES = {"health.spike_factor": 5.0, "health.spike_window": 8, "health.on_spike": "skip"}
CPU = torch.device("cpu")


def running(**changes: Any) -> Any:
    """The parts of a tiny run that a step needs. messages: those of the run."""
    layers = "model.layers=[attention,gated_deltanet]"
    small = ("model.dim=16", "model.ffn_dim=16", f"model.vocab_size={VOCABULARY}", layers)
    config = change(compose(["experiment=rule110", "sleep.curriculum=[]", *small]), changes)
    progress, messages = Progress(), list[str]()
    engine = LocalEngine(config, CPU, progress)
    spikes = SpikeDetector(config.health.spike_factor, config.health.spike_window)
    run = SimpleNamespace(config=config, world=alone(), progress=progress, engine=engine, spikes=spikes)
    run.step = run.tokens = 0
    run.feed = SimpleNamespace(facts=StepFacts, agree_on=lambda totals: None)
    run.carried, run.precision_proven, run.message, run.messages = None, False, messages.append, messages
    return run


def step(run: Any) -> Any:
    batch, shape = random_batch([[0] * 8, [0] * 8]), StepShape(2, 4, 2)
    totals = step_totals(run.config, run.world, batch, shape)
    return try_step(run, StepInputs(batch, totals, run.engine.plan(batch, shape)), shape, 1e-3, None)


def weights(run: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.engine.model.parameters()]


def changed(run: Any, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, w) for p, w in zip(run.engine.model.parameters(), before, strict=True))


def test_a_step_updates_the_weights_and_the_first_names_the_precision() -> None:
    run = running()
    before = weights(run)
    outcome = step(run)
    assert outcome.failure is None and math.isfinite(outcome.norm) and outcome.norm > 0
    assert changed(run, before) and run.precision_proven
    assert run.progress.now.phase is Phase.UPDATE
    step(run)
    assert run.messages == ["the first step's matrix products ran in float32"]


def test_a_loss_that_is_not_finite_is_no_update_and_is_located() -> None:
    run = running(**{"health.on_nonfinite": "skip"})
    before = weights(run)

    def broken(module: Any, inputs: Any, output: Any) -> Any:
        features, state = output
        return (None if features is None else features * math.nan), state

    run.engine.model.blocks[1].register_forward_hook(broken, prepend=True)
    failure = step(run).failure
    assert not changed(run, before)
    assert failure is not None and (failure.policy, failure.error) == ("skip", NonFiniteError)
    assert failure.text.startswith("step 1: loss nan, gradient norm nan; first seen at")
    assert "layer 1" in failure.text and failure.setting == "health.on_nonfinite"


def test_a_norm_that_is_not_finite_is_located_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run = running()
    monkeypatch.setattr(run.engine, "step", lambda scale, accepts: math.inf)
    monkeypatch.setattr(run.engine, "locate_nonfinite", lambda *_: "somewhere")
    failure = step(run).failure
    assert failure is not None and failure.text.endswith("gradient norm inf; somewhere")


def test_a_spike_is_no_update() -> None:
    run = running(**SPIKES)
    for _ in range(8):
        assert step(run).failure is None
    run.engine.model.norm.register_forward_hook(lambda module, inputs, x: x * 1e3)
    before = weights(run)
    failure = step(run).failure
    assert not changed(run, before)
    assert failure is not None and (failure.setting, failure.policy) == ("health.on_spike", "skip")
    assert failure.error is SpikeError and failure.text.startswith("step 1: loss ")


def made(in_vain: int = 0) -> Any:
    """The parts of a run that a failure needs. messages: those of the run; went_back: the reasons of rollbacks."""
    run = SimpleNamespace(skipped=2, messages=[], went_back=[], rollbacks=Rollbacks(in_vain=in_vain, furthest=7))
    run.config = SimpleNamespace(health=SimpleNamespace(max_rollbacks=3))
    run.message, run.roll_back = run.messages.append, run.went_back.append
    return run


def failure(policy: str) -> StepFailure:
    return StepFailure("step 4: loss 9", "health.on_spike", policy, SpikeError)


def test_a_skipped_step_is_counted_and_reported() -> None:
    run = made()
    assert handle_failure(run, failure("skip"))
    assert run.skipped == 3 and run.messages == ["skipped step 4: loss 9 (3 skipped so far)"] and run.went_back == []


def test_a_run_that_is_to_stop_names_the_other_policies() -> None:
    with pytest.raises(SpikeError, match=r"step 4: loss 9\. .*health\.on_spike=skip .*health\.on_spike=rollback"):
        handle_failure(made(), failure("stop"))


def test_a_run_goes_back_until_rollbacks_have_not_helped() -> None:
    run = made(in_vain=2)
    assert not handle_failure(run, failure("rollback"))
    assert run.went_back == ["step 4: loss 9"] and run.skipped == 2
    with pytest.raises(SpikeError, match=r"3 rollbacks \(health\.max_rollbacks\) .* past step 7"):
        handle_failure(made(in_vain=3), failure("rollback"))
