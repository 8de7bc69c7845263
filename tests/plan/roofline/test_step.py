"""The time of a step, and the efficiency that a plan takes from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.distributed.gpus import GPUS, find_gpu
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.step import StepCount, count_step, rows_together
from sleeptrain.plan.workload import workloads
from sleeptrain.sleep.rounds import Round
from tests.plan.planned import text
from tests.plan.roofline.counted import counted_2b

H200 = GPUS["H200"]
SMALL = ("model.layers=[gated_deltanet,attention]", "sleep.passes=1", "data.sequence=256", "sleep.window=256")


def step(mode: str, compile: bool = False) -> StepCount:
    config, workload, batch, records = counted_2b()
    return count_step(config, workload, H200, compile, batch, records, mode)


def test_what_runs_again_takes_time_and_is_no_model_flop() -> None:
    none, selective, whole = (step(mode) for mode in ("none", "selective", "pass"))
    assert none.work.total < selective.work.total < whole.work.total
    assert none.flops == whole.flops < none.padded == whole.padded
    assert none.executed == selective.executed == none.padded < whole.executed
    assert whole.utilisation(H200) < none.utilisation(H200) < 1
    assert step("none", compile=True).work.total < none.work.total


def test_the_rounds_after_the_last_loss_have_no_backward() -> None:
    """And the sums of weight gradients are one fewer than the rounds with a backward, beside zeros once in the step."""
    config, workload, batch, records = counted_2b()
    assert len(workload.trained(1)) == 4 < len(workload.rounds) == 6
    [wake, *_] = workload.rounds
    one = replace(workload, rounds=(wake,), stretches=((wake,),))
    alone = count_step(config, one, H200, False, batch, records, "none").work
    assert alone.kernels[Kind.SUM] == 1 < step("none").work.kernels[Kind.SUM]


def test_cuda_graphs_copy_what_they_read_and_spare_the_host() -> None:
    plain, graphs = (
        count_step(config, workloads(config, 1)[0], H200, True)
        for config in (text("sleep.recompute=none", f"train.cuda_graphs={on}", *SMALL) for on in ("false", "true"))
    )
    assert graphs.flops == plain.flops and graphs.work.host < plain.work.host
    assert graphs.work.bytes[Kind.ELEMENTWISE] > plain.work.bytes[Kind.ELEMENTWISE]


def test_the_passes_of_a_window_are_multiplied_together() -> None:
    def passes(last: int, length: int) -> list[Round]:
        return [Round(0, 0, 2048, n, (0,), skip=0 if n == 1 else 2048 - length) for n in range(1, last + 1)]

    for last, length, expected in ((4, 384, 1152), (8, 512, 7 * 512 // 3), (2, 384, 0), (4, 640, 0)):
        wake, *sleeps = rounds = passes(last, length)
        assert rows_together(wake, rounds) == 0
        assert {rows_together(r, rounds) for r in sleeps} == {expected}


def test_the_plan_takes_its_efficiency_from_the_count() -> None:
    config = text("sleep.recompute=pass", "data.batch=2", *SMALL)
    [named], [counted] = (make_plan(config, 1, find_gpu("H200"), share).steps for share in (0.4, None))
    assert named.efficiency == 0.4 and counted.efficiency is not None
    expected = count_step(config, counted.workload, H200, False)
    assert counted.efficiency == expected.efficiency(H200)
    assert counted.speed is not None
    assert counted.speed.compute == pytest.approx(expected.seconds * counted.workload.num_micros)
    assert make_plan(config, 1, None, None).steps[0].efficiency is None


def test_a_tensor_rank_does_its_part() -> None:
    whole, half = (
        count_step(config, workloads(config, 1)[0], H200, False)
        for config in (text(*SMALL, f"parallel.tensor={size}", "data.batch=64", "model.dim=512") for size in (1, 2))
    )
    assert half.flops == whole.flops / 2
    assert 0.4 < half.work.bytes[Kind.PRODUCT] / whole.work.bytes[Kind.PRODUCT] < 1


def test_stages_that_share_the_head_multiply_it_once() -> None:
    """A head of its own stage runs again with its round; a part keeps its logits."""
    config = text(*SMALL, "data.batch=4", "parallel.pipeline=2", "sleep.recompute=none")
    whole, shared = (
        count_step(changed, workloads(changed, 1)[0], H200, False)
        for changed in (config, replace(config, parallel=replace(config.parallel, split_head=True)))
    )
    assert shared.flops == whole.flops and shared.executed < whole.executed
    assert whole.work.kernels[Kind.HEAD] == 4 and shared.work.kernels[Kind.HEAD] == 2 * 3
    assert shared.work.bytes[Kind.HEAD] < whole.work.bytes[Kind.HEAD]
