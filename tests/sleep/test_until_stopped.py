from __future__ import annotations

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import SleepConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import Boundary, FastWeights, Recurrent
from sleeptrain.sleep import live as live_module
from sleeptrain.sleep import loop as loop_module
from sleeptrain.sleep import until_stopped as until_stopped_module
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import forward_flops, step_flops
from sleeptrain.sleep.live import begin, read
from sleeptrain.sleep.loop import LoopSettings, RoundContext, run_rounds
from sleeptrain.sleep.rounds import Round, plan_rounds, window_facts
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from sleeptrain.sleep.stop_rule import StopRule
from sleeptrain.sleep.until_stopped import RuledRounds, Stopped, deciding_rounds, run_until_stopped
from tests.models import random_batch, tiny_model
from tests.sleep.oracle import Stops, oracle_loss
from tests.sleep.test_loop import EXACT, assert_same, total
from tests.sleep.test_step import config
from tests.sleep.trained import texts

WINDOW, PASSES = 4, 4
ROWS = [
    [0] * 14,
    [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4],
    [PAD] * 5 + [0] * 9,
    [0] * 6 + [1] * 8,
    [PAD] * 14,
    [5] * 14,
]


def a_batch(target_share: float = 0.6) -> Batch:
    return random_batch(ROWS, target_share=target_share, continues=[True, False, True, False, False, True])


def run(model: Hybrid, batch: Batch, rule: StopRule, settings: LoopSettings, when: str, feedback: str) -> Stopped:
    rounds = plan_rounds(window_facts(batch, WINDOW), PASSES, when, feedback)
    return run_until_stopped(model, RuledRounds(batch, rounds, settings, rule), model.empty_state())


def middle_threshold(model: Hybrid, batch: Batch, kind: str, settings: LoopSettings, when: str, feedback: str) -> float:
    """A threshold that about half of the finite scores lie under."""
    all_passes = run(model, batch, StopRule(kind, -1.0, 1, settings.core), settings, when, feedback)
    scores = torch.tensor([score for _, of_rows in all_passes.scores.values() for score in of_rows])
    return float(scores[scores.isfinite()].median())


def oracle_rule(kind: str, threshold: float, min_passes: int) -> Stops:
    """The rules, written again for a row alone."""

    def stops(n: int, step: torch.Tensor, last: torch.Tensor | None, before: FastWeights, after: FastWeights) -> bool:
        if n < min_passes:
            return False
        if kind == "acceleration":
            return last is not None and bool((step - last).norm() / (step.norm() + last.norm()) <= threshold)
        changes = [
            ((new.S_BHKV - old.S_BHKV) if old is not None else new.S_BHKV).norm() / new.S_BHKV.norm()
            for old, new in zip(before.layers, after.layers, strict=True)
            if isinstance(new, Recurrent)
        ]
        return bool(sum(changes) / len(changes) <= threshold)

    return stops


@pytest.mark.parametrize("kind", ["change", "acceleration"])
@pytest.mark.parametrize(("when", "feedback", "min_passes"), [("every", "features", 1), ("unlabelled", "none", 2)])
def test_each_row_stops_as_it_does_alone(kind: str, when: str, feedback: str, min_passes: int) -> None:
    model, batch = tiny_model(), a_batch(0.6 if when == "every" else 0.1)
    settings = LoopSettings((0, model.num_layers))
    threshold = middle_threshold(model, batch, kind, settings, when, feedback)
    rule = StopRule(kind, threshold, min_passes, settings.core)
    stopped = run(model, batch, rule, settings, when, feedback)
    counts = set(itertools.chain.from_iterable(stopped.passes_KB))
    assert len(counts) > 2, "rows of one batch stop after different passes"
    alone = oracle_loss(model, batch, WINDOW, PASSES, when, feedback, stops=oracle_rule(kind, threshold, min_passes))
    torch.testing.assert_close(total(stopped.losses), alone[0].detach(), **EXACT)

    rounds = plan_rounds(window_facts(batch, WINDOW), stopped.passes_KB, when, feedback)
    losses, state = run_rounds(model, batch, rounds, model.empty_state(), settings)
    assert_same(model, total(losses), alone[0])
    for row in (0, 5):  # they go on after the step
        for ours, theirs in zip(state.layers, alone[1][row].layers, strict=True):
            if isinstance(ours, Recurrent):
                torch.testing.assert_close(ours.S_BHKV[row : row + 1], theirs.S_BHKV, **EXACT)


@pytest.mark.parametrize("core", [None, (1, 2)])
@pytest.mark.parametrize("boundary", [Boundary(carry_conv=True), Boundary(sliding_window=WINDOW)])
def test_equals_the_plan_made_from_its_decisions(core: tuple[int, int] | None, boundary: Boundary) -> None:
    model, batch = tiny_model(), a_batch()
    settings = LoopSettings(core or (0, model.num_layers), boundary)
    threshold = middle_threshold(model, batch, "change", settings, "every", "features")
    stopped = run(model, batch, StopRule("change", threshold, 1, settings.core), settings, "every", "features")
    assert len(set(itertools.chain.from_iterable(stopped.passes_KB))) > 2
    rounds = plan_rounds(window_facts(batch, WINDOW), stopped.passes_KB)
    with torch.no_grad():
        losses, state = run_rounds(model, batch, rounds, model.empty_state(), settings)
    assert losses.keys() == stopped.losses.keys()
    for window, loss in losses.items():
        torch.testing.assert_close(stopped.losses[window], loss, **EXACT)
    for ours, theirs in zip(
        tree_leaves(stopped.state.rows(torch.tensor([0, 5])).to_state_dict()),
        tree_leaves(state.rows(torch.tensor([0, 5])).to_state_dict()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def watch_rows_that_stopped(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[int]:
    """Checks in each sleep pass that the memory of the rows that take no part stays as it is, bit for bit.

    Returns the number of these rows in each pass, as passes run.
    """
    counts, run_on_rows = list[int](), module.run_on_rows

    def checked(context: RoundContext, num_rows: int, r: Round, *rest: Any) -> Any:
        output, after, x_ND = run_on_rows(context, num_rows, r, *rest)
        stopped = torch.tensor([row for row in range(num_rows) if row not in r.rows], dtype=torch.long)
        if not r.is_wake and len(stopped):
            before = rest[2].rows(stopped).to_state_dict()
            assert any("conv" in name for name in before), "convolutions carry their inputs"
            kept = after.rows(stopped).to_state_dict()
            assert before.keys() == kept.keys() and all(torch.equal(kept[name], t) for name, t in before.items())
            counts.append(len(stopped))
        return output, after, x_ND

    monkeypatch.setattr(module, "run_on_rows", checked)
    return counts


@pytest.mark.parametrize("module", [loop_module, until_stopped_module, live_module], ids=lambda m: m.__name__)
def test_a_row_that_stopped_keeps_its_memory(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """In the training loop, in evaluations and in generation: S, convolutions and retained keys and values."""
    model, batch = tiny_model(), a_batch()
    settings = LoopSettings((0, model.num_layers), Boundary(sliding_window=WINDOW, carry_conv=True))
    threshold = middle_threshold(model, batch, "change", settings, "every", "features")
    rule = StopRule("change", threshold, 1, settings.core)
    generated = live_module is module
    # Generation with the rule runs its sleep passes in the loop of the rule.
    counts = watch_rows_that_stopped(monkeypatch, until_stopped_module if generated else module)
    if generated:
        sleep = SleepConfig(
            passes=PASSES,
            window=WINDOW,
            stop="change",
            stop_threshold=threshold,
            eviction="sliding",
            conv_state="carry",
        )
        live = begin(model, 4)
        for tokens in torch.stack(texts([3 * WINDOW] * 4)).split(WINDOW, dim=1):
            _, live = read(model, live, tokens, [WINDOW] * 4, [True] * 4, sleep)
    else:
        stopped = run(model, batch, rule, settings, "every", "features")
        rounds = plan_rounds(window_facts(batch, WINDOW), stopped.passes_KB)
        run_rounds(model, batch, rounds, model.empty_state(), settings)
    assert counts and len(set(counts)) > 1, "rows stop after different passes"


def test_thresholds_between_all_and_no_sleep() -> None:
    model, batch = tiny_model(), a_batch()
    settings = LoopSettings((0, model.num_layers))
    for threshold, passes in ((-1.0, PASSES), (10.0, 1)):
        stopped = run(model, batch, StopRule("change", threshold, 1, settings.core), settings, "every", "features")
        fixed = plan_rounds(window_facts(batch, WINDOW), passes)
        with torch.no_grad():
            losses, _ = run_rounds(model, batch, fixed, model.empty_state(), settings)
        torch.testing.assert_close(total(stopped.losses), total(losses), **EXACT)
        assert max(itertools.chain.from_iterable(stopped.passes_KB)) == passes
    least = run(model, batch, StopRule("change", 10.0, 3, settings.core), settings, "every", "features")
    assert set(itertools.chain.from_iterable(least.passes_KB)) == {1, 3}, "1: rows that do not sleep"


def test_nothing_runs_after_the_last_decision_and_nothing_predicts() -> None:
    rounds = plan_rounds(window_facts(random_batch([[0] * 14]), WINDOW), 2)
    deciding = deciding_rounds(rounds)
    assert [(r.window, r.pass_index) for r in deciding] == [(w, n) for w in range(3) for n in (1, 2)]
    assert not any(r.loss for r in deciding) and rounds[-1].window == 3
    assert deciding_rounds(rounds[:1]) == [], "no row may sleep"


def flops_of_a_ruled_step(model: Hybrid, batch: Batch, threshold: float, micro_batch: int) -> int:
    """Those of the plan, and in each micro-batch of a forward up to the last window that may sleep, with the coda in
    each pass: nobody knows yet which one is the last of a row."""
    core, planned, deciding = (0, model.num_layers), list[Round](), list[Round]()
    for first in range(0, len(ROWS), micro_batch):
        part = batch.rows(first, first + micro_batch)
        stopped = run(model, part, StopRule("change", threshold, 1, core), LoopSettings(core), "every", "features")
        rounds = plan_rounds(window_facts(part, WINDOW), stopped.passes_KB)
        sleeping = [r.window for r in plan_rounds(window_facts(part, WINDOW), PASSES) if not r.is_wake]
        planned += rounds
        deciding += [
            replace(r, coda=True, loss=False, state_only=r.pass_index == PASSES)
            for r in rounds
            if sleeping and r.window <= max(sleeping)
        ]
    config, targets = model.config, int((batch.targets_BT != IGNORE).sum())
    return step_flops(config, planned, targets, core) + forward_flops(config, deciding, core)


def test_a_step_trains_with_the_passes_that_the_rule_leaves() -> None:
    """In micro-batches, with gradients that equal those of rows alone, and FLOPs of the passes that ran."""
    model, batch = tiny_model(), a_batch()
    core = (0, model.num_layers)
    threshold = middle_threshold(model, batch, "change", LoopSettings(core), "every", "features")
    shape = StepShape(PASSES, WINDOW, len(ROWS))

    def step(**changes: object) -> tuple[StepResult, dict[str, torch.Tensor]]:
        settings = config(train__micro_batch=2, **changes)
        model.zero_grad()
        result = forward_backward(step_context(settings, shape, model), model, batch, shape, None)
        return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    result, gradients = step(sleep__stop="change", sleep__stop_threshold=threshold)
    stops = oracle_rule("change", threshold, 1)
    targets = int((batch.targets_BT != IGNORE).sum())
    expected, _ = oracle_loss(model, batch, WINDOW, PASSES, stops=stops)
    model.zero_grad()
    (expected / targets).backward()
    assert result.loss == pytest.approx(float(expected.detach()) / targets, rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients.get(name), parameter.grad, rtol=1e-9, atol=1e-12)
    fixed, _ = step()
    assert result.flops < fixed.flops and result.loss != fixed.loss
    assert result.flops == flops_of_a_ruled_step(model, batch, threshold, 2)
    drawn, _ = step(sleep__stop="change", sleep__stop_threshold=threshold, sleep__sample_passes=True)
    assert drawn.loss == fixed.loss, "the draw decides in training"
