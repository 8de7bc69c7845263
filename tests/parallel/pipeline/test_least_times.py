"""The least time of a step is below that of every schedule, and exact where nothing waits twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeptrain.parallel.pipeline.least_times import least_times
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.task_costs import Costs
from tests.parallel.pipeline.cases import any_plans, any_stages, even_stages, plan


@settings(max_examples=60, deadline=None)
@given(any_plans(), any_stages(), st.sampled_from([0.0, 3.0]), st.booleans())
def test_no_schedule_ends_before_the_least_time(plans, stages, head, split):  # type: ignore[no-untyped-def]
    costs, stages = Costs(head=head), replace(stages, split_head=split and stages.num_stages > 1)
    busy, least = least_times(plans, stages, costs)
    simulation = simulate(schedule(plans, stages, costs), costs)
    assert busy == pytest.approx(list(simulation.busy)) and least <= simulation.finish * (1 + 1e-9)


def test_the_least_time_of_a_plain_pipeline_is_exact() -> None:
    plans, stages = [plan(1, 1)] * 4, even_stages(4)
    assert least_times(plans, stages, Costs())[1] == simulate(schedule(plans, stages)).finish


def test_the_least_time_of_one_micro_batch_is_exact() -> None:
    """Its passes wait for each other, so that the stages idle in turn."""
    plans, stages = [plan(3, 2)], even_stages(4)
    finish = simulate(schedule(plans, stages)).finish
    busy, least = least_times(plans, stages, Costs())
    assert least == pytest.approx(finish) and least > 1.5 * max(busy)
