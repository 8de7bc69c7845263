"""The forecast of a step's time."""

from __future__ import annotations

import pytest

from sleeptrain.distributed.gpus import Gpu
from sleeptrain.plan.speed import Speed, Traffic, Work, forecast, hours, leaves_machine
from tests.plan.planned import planned, text


def test_time_is_work_bubble_and_messages():
    gpu = Gpu(flops=100.0, memory=1.0, bandwidth=4.0, intra=10.0, inter=1.0)
    work = Work(flops=300.0, executed=100.0, bubble=0.25, orthogonalised=25.0, state=1.0, tokens=42)
    speed = forecast(gpu, 0.5, 4, work, Traffic(tensor=2.0, data=3.5))
    assert (speed.compute, speed.tensor, speed.bubble, speed.data, speed.update) == (2.0, 2.0, 1.0, 3.5, 1.0)
    assert speed.seconds == 9.5 and speed.tokens_per_second == 42 / 9.5
    assert speed.mfu == pytest.approx(300 / 9.5 / 400)


def test_a_forecast_of_one_process_reaches_the_efficiency():
    speed = planned(text("train.precision=bf16"), gpu="H100").steps[0].speed
    assert speed is not None and speed.mfu * speed.seconds / (speed.seconds - speed.update) == pytest.approx(0.4)
    again = planned(text("sleep.recompute=pass"), gpu="H100").steps[0].speed
    assert again is not None and again.compute / speed.compute == pytest.approx(4 / 3)


def test_a_link_leaves_a_machine_where_its_ranks_are_more_than_its_gpus() -> None:
    none = {"tensor": False, "shard": False, "data": False, "pipeline": False}
    assert leaves_machine(8, 1, 1) == none
    assert leaves_machine(4, 4, 1) == none | {"shard": True, "data": True, "pipeline": True}
    assert leaves_machine(4, 4, 1, shard=2) == none | {"data": True, "pipeline": True}
    assert leaves_machine(2, 4, 2) == none | {"pipeline": True}


def test_hours_count_all_steps() -> None:
    one, two = (Speed(seconds, 0, 0, 0, 0, 0, 0, 0) for seconds in (1.8, 3.6))
    assert hours([one, two], [1000, 500]) == 1.0 and hours([], []) == 0
