"""The line with the expected cost of a run."""

from __future__ import annotations

from sleeptrain.plan.expected import expected_cost
from sleeptrain.plan.report import short
from tests.plan.planned import planned, rule110


def test_it_is_the_plans_cost() -> None:
    config = rule110("sleep.curriculum=[{tokens: 280, passes: 4}]")
    plan = planned(config)
    flops = sum(step.flops * step.workload.num_steps for step in plan.steps)
    steps = sum(step.workload.num_steps for step in plan.steps)
    assert expected_cost(config) == (
        f"rule110: {short(plan.parameters)} parameters, about {steps} steps, 672 tokens and {short(flops)} FLOPs"
    )


def test_a_sampled_number_of_passes_costs_the_mean() -> None:
    each = [planned(rule110(f"sleep.passes={n}")).steps[0].flops for n in (1, 2, 3)]
    said = expected_cost(rule110("sleep.sample_passes=true"))
    assert said.endswith(f" and {short(12 * sum(each) // 3)} FLOPs")


def test_one_step_is_no_steps() -> None:
    assert "about 1 step, 56 tokens" in expected_cost(rule110("train.tokens=56"))
