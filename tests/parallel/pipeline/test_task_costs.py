"""The time of a task, in the unit that schedules are compared in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.graph import Direction
from sleeptrain.parallel.pipeline.task_costs import LEAST_HEAD, Costs, TaskTimes
from tests.parallel.pipeline.cases import plan
from tests.parallel.pipeline.test_stages import PARTIAL


@pytest.mark.parametrize("times", [dict(forward=0), dict(backward=-1), dict(head=-1), dict(message=-0.1)])
def test_impossible_times_are_refused(times):
    with pytest.raises(ConfigError):
        Costs(**times)


def test_costs_count_layers_tokens_and_the_head_where_there_is_a_loss():
    wake, sleep = plan(2, 2)[:2]
    costs = Costs(forward=1, backward=3, head=5)
    assert [costs.time(wake, PARTIAL, s, Direction.FORWARD) for s in range(4)] == [8, 8, 8, 28]
    assert [costs.time(sleep, PARTIAL, s, Direction.BACKWARD) for s in range(4)] == [12, 24, 24, 12]


def test_stages_share_the_time_of_a_head() -> None:
    (wake,), shared, costs = plan(1, 1), replace(PARTIAL, split_head=True), Costs(forward=1, backward=3, head=8)
    assert [costs.time(wake, shared, s, Direction.FORWARD) for s in range(4)] == [8, 8, 8, 8]
    assert [costs.time(wake, shared, s, Direction.HEAD_FORWARD) for s in range(4)] == [8] * 4
    assert [costs.time(wake, shared, s, Direction.HEAD_BACKWARD) for s in range(4)] == [16] * 4
    assert replace(costs, head=0).time(wake, shared, 0, Direction.HEAD_FORWARD) == 4 * LEAST_HEAD


def test_times_of_tasks_are_those_of_their_rounds_also_where_micro_batches_share_a_plan() -> None:
    shared, other, costs = plan(2, 2), plan(2, 3), Costs(forward=1, backward=3, head=5)
    plans, stages = [shared, other, shared], replace(PARTIAL, split_head=True)
    times = TaskTimes(plans, stages, costs)
    tasks = [
        (direction, mb, index, stage)
        for mb, rounds in enumerate(plans)
        for index in range(len(rounds))
        for stage in range(stages.num_stages)
        for direction in Direction
    ]
    found = [times.of(*task) for task in tasks]
    assert found == [costs.time(plans[mb][i], stages, stage, direction) for direction, mb, i, stage in tasks]
    assert len(set(found)) > 3
