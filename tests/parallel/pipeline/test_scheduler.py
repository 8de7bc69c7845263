"""The order of tasks in simulated time: groups, the limit of live rounds, and no task before its inputs."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sleeptrain.parallel.pipeline.graph import Direction, Task, build_graph
from sleeptrain.parallel.pipeline.scheduler import form_groups, live_limits, order_tasks, timed
from sleeptrain.parallel.pipeline.task_costs import Costs
from tests.parallel.pipeline.cases import LENGTH, even_stages, plan

F, B = Direction.FORWARD, Direction.BACKWARD
UNIT = Costs(forward=1 / LENGTH, backward=3 / LENGTH)  # on a stage of one layer


@pytest.mark.parametrize(
    ("micro_batches", "ring", "most", "groups"),
    [
        (8, 3, None, [0, 0, 0, 0, 1, 1, 1, 1]),
        (5, 3, None, [0] * 5),
        (2, 3, None, [0, 0]),
        (3, 1, None, [0, 1, 2]),
        (5, 3, 2, [0, 0, 1, 1, 2]),
        (4, 1, 9, [0] * 4),
        (0, 2, None, []),
        (0, 2, 1, []),
    ],
)
def test_groups_fill_the_ring_or_stay_within_the_limit(
    micro_batches: int, ring: int, most: int | None, groups: list[int]
) -> None:
    assert form_groups(micro_batches, ring, most) == groups


def test_one_round_by_hand() -> None:
    stages, plans = even_stages(2, each=1), [plan(1, 1)]
    graph = build_graph(plans, stages)
    ends = order_tasks(graph, plans, stages, UNIT, [0])
    there, back = ([Task(direction, 0, 0, stage) for stage in (0, 1)] for direction in (F, B))
    assert ends == {there[0]: 1, there[1]: 2, back[1]: 5, back[0]: 8}
    assert timed(ends, graph, plans, stages, UNIT) == ends
    slower = timed(ends, graph, plans, stages, Costs(forward=2 / LENGTH, backward=3 / LENGTH))
    assert list(slower.values()) == [2, 4, 7, 10]


def test_a_stage_does_one_task_at_a_time_and_none_before_its_inputs() -> None:
    stages, plans = even_stages(3, each=1), [plan(2, 2)] * 5
    graph = build_graph(plans, stages)
    ends = order_tasks(graph, plans, stages, UNIT, form_groups(5, 3, None))
    assert ends.keys() == graph.before.keys()
    starts = {task: end - (3 if task.direction is B else 1) for task, end in ends.items()}
    for task, before in graph.before.items():
        assert all(ends[other] <= starts[task] for other in before)
    for stage in range(3):
        spans = sorted((starts[task], ends[task]) for task in ends if task.stage == stage)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_forwards_and_backwards_alternate_where_both_are_ready() -> None:
    stages, plans = even_stages(1, each=1), [plan(1, 1)] * 4
    graph = build_graph(plans, stages)
    ends = order_tasks(graph, plans, stages, UNIT, [0] * 4)
    assert [task.direction for task in sorted(ends, key=ends.__getitem__)] == [F, B] * 4


def test_the_limit_is_the_largest_group_and_a_round_for_each_stage_outside_the_ring() -> None:
    stages, plans = even_stages(3), [plan(1, 1)] * 5
    assert live_limits(build_graph(plans, stages), plans, stages, [0, 0, 0, 1, 1]) == [3 + 2] * 3
    plans = [plan(2, 2)] * 3
    rounds = len(plans[0])
    assert live_limits(build_graph(plans, stages), plans, stages, [0, 0, 1]) == [2 * rounds] * 3
    assert live_limits(build_graph([], stages), [], stages, []) == [2] * 3


def test_no_more_rounds_are_alive_than_the_limit() -> None:
    stages, plans = even_stages(2, each=1), [plan(1, 1)] * 6
    graph = build_graph(plans, stages)
    groups = list(range(6))
    ends = order_tasks(graph, plans, stages, UNIT, groups)
    limits = live_limits(graph, plans, stages, groups)
    for stage, limit in enumerate(limits):
        changes = [(end - 1, 1) for task, end in ends.items() if task.stage == stage and task.direction is F]
        changes += [(end, -1) for task, end in ends.items() if task.stage == stage and task.direction is B]
        alive = [sum(change for when, change in changes if when <= now) for now, _ in changes]
        assert 1 <= max(alive) <= limit
