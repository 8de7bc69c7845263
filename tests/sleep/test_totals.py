"""The totals of a step, exchanged by its processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.totals import StepTotals, asks_order, step_totals
from tests.checkpoint.worlds import all_or_raise, alone
from tests.configs import change
from tests.models import random_batch
from tests.parallel.processes import run_ranks

SHAPE = StepShape(2, 4, 4)
FULL, PADS = [0] * 8, [0] * 5 + [-1] * 3


def config(zero: int, pipeline: int = 1) -> Config:
    return change(Config(), {"parallel.zero": zero, "parallel.pipeline": pipeline, "sleep.when": "unlabelled"})


def test_one_process_counts_its_own_rows() -> None:
    batch = random_batch([FULL, PADS])
    totals = step_totals(config(1), alone(), batch, SHAPE)
    assert totals == StepTotals(13, int((batch.targets_BT >= 0).sum()), 0, 0, False)
    assert step_totals(config(1), alone(), None, SHAPE, stopping=True) == StepTotals(0, 0, 1, 1, False)


def test_the_order_of_gradients_is_asked_where_each_backward_may_sum_them() -> None:
    assert [asks_order(config(zero)) for zero in range(4)] == [False, False, True, True]
    assert not asks_order(config(2, pipeline=2))


def _totals(plan: str) -> StepTotals:
    """Both replicas predict in the first window, or only one does, or their rows are cut into other windows."""
    world: World = all_or_raise()
    first = world.rank == 0
    batch = random_batch([FULL])
    targets_BT = batch.targets_BT.clone()
    targets_BT[:, 4 if plan == "both predict" and first else 8 :] = -100
    if plan == "one predicts" and first:
        targets_BT[:, :4] = -100
    batch = replace(batch, targets_BT=targets_BT)
    return step_totals(config(2), world, None if plan == "cancelled" and first else batch, SHAPE, first)


@pytest.mark.parametrize(
    ("plan", "alike"), [("equal", True), ("both predict", True), ("one predicts", False), ("cancelled", False)]
)
def test_replicas_that_differ_are_known_to_both(plan: str, alike: bool) -> None:
    first, second = run_ranks(_totals, 2, plan)
    assert first == second
    assert first.alike is alike
    assert (first.stopping, first.cancelled) == (1, int(plan == "cancelled"))
    assert first.tokens == (8 if plan == "cancelled" else 16)
