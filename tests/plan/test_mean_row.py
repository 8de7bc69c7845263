"""The cost of a row, also under settings that no run has."""

from __future__ import annotations

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.data.batch import IGNORE
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import step_flops
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import plan_batch

SMALL = ["experiment=stdlib", "data.batch=1", "data.sequence=256", "sleep.curriculum=[]"]


@pytest.mark.parametrize("policy", ["sleep.when=every", "sleep.feedback=none", "sleep.eviction=sliding"])
@pytest.mark.parametrize("passes", [1, 2, 3, 4, 9])
def test_any_number_of_passes_costs_as_much_as_its_rounds(policy: str, passes: int) -> None:
    config = compose([*SMALL, policy])
    row = MeanRow(config)
    rounds, settings = (
        plan_batch(row._sample, 100, passes, config.sleep),
        loop_settings(config.sleep, 100, len(config.model.layers)),
    )
    targets = int((row._sample.targets_BT != IGNORE).sum())
    expected = step_flops(config.model, rounds, targets, settings.core, settings.boundary.sliding_window)
    assert row.step_flops(StepShape(passes, 100, 1)) == expected


def test_a_number_of_passes_that_no_run_has_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged record may hold such a number. The run plans at most three passes."""
    planned = list[int]()

    def plan(batch: object, window: int, passes: int, *rest: object) -> object:
        planned.append(passes)
        return plan_batch(batch, window, passes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("sleeptrain.plan.mean_row.plan_batch", plan)
    row = MeanRow(compose(SMALL))
    two, three = (row.step_flops(StepShape(n, 100, 1)) for n in (2, 3))
    assert row.step_flops(StepShape(10**9, 100, 1)) == two + (10**9 - 2) * (three - two)
    assert max(planned) == 3
