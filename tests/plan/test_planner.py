"""A planner counts once what layouts share, and its bounds hold."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import Config
from sleeptrain.distributed.gpus import GPUS
from sleeptrain.plan.planner import Planner
from tests.plan.planned import planned, text

SETTINGS = ("sleep.passes=2", "train.micro_batch=2", "parallel.pipeline=2")


def one(*more: str) -> Config:
    return text(*SETTINGS, *more)


def test_what_layouts_share_is_counted_once() -> None:
    planner = Planner(GPUS["H100"], 0.4)
    first, second = one("parallel.zero=1"), one("parallel.zero=2")
    [work] = planner.workloads(first, 2)
    assert planner.workloads(second, 2)[0] is work
    assert planner.schedule(first, work) is planner.schedule(second, work)
    assert planner.tensor(first, work) is planner.tensor(second, work)
    assert planner.memory(first, work) is not planner.memory(second, work)
    again = one("sleep.recompute=block")
    assert planner.memory(again, work) != planner.memory(first, work)


@pytest.mark.parametrize("mode", ["none", "block"])
def test_bounds_are_below_what_a_plan_says(mode: str) -> None:
    config = one(f"sleep.recompute={mode}")
    planner = Planner(GPUS["H100"], 0.4)
    [work] = planner.workloads(config, 2)
    [step] = planned(config, 4, "H100").steps
    assert step.speed is not None
    compute = planner.least_compute(config, 4, work, counted=True)
    assert 0 < compute < planner.least_seconds(config, 4, work) <= step.speed.seconds
    assert planner.fullest(config, work, peaks=False) < max(m.total for m in step.memory)
    assert planner.speed(config, 4, work) == step.speed and planner.memory(config, work) == step.memory


def test_a_named_efficiency_records_nothing() -> None:
    config = one()
    planner = Planner(GPUS["H100"], 0.3)
    [work] = planner.workloads(config, 1)
    assert planner.efficiency_of(config, work) == 0.3 and not planner.host_bound(config, work)
