"""The memory of a stage, by kind."""

from __future__ import annotations

from sleeptrain.plan.memory import StageMemory
from sleeptrain.sleep.recompute import MODES
from tests.plan.planned import planned, text


def test_recomputation_saves_memory_and_boundaries_do_not_grow_with_layers():
    memory = {
        mode: planned(text(f"sleep.recompute={mode}", "sleep.passes=4", "train.micro_batch=4")).steps[0].memory[0]
        for mode in MODES
    }
    total = {mode: memory[mode].total for mode in MODES}
    assert total["none"] > total["selective"] > total["block"]
    assert total["selective"] > total["pass"] > total["window"]
    assert memory["none"].boundary == 0 < memory["window"].boundary < memory["pass"].boundary


def test_a_total_is_the_sum_of_all_kinds() -> None:
    assert StageMemory(1, 2, 4, 8, 16, 32, 64, 128, 256).total == 511


def test_only_the_last_stage_has_logits_and_only_pipelines_send_messages() -> None:
    [alone] = planned(text()).steps[0].memory
    assert alone.logits > 0 == alone.messages
    first, last = planned(text("parallel.pipeline=2", "train.micro_batch=4"), 2).steps[0].memory
    assert first.logits == 0 < last.logits and first.messages > 0 < last.messages


def test_cuda_graphs_keep_the_memory_of_all_rounds() -> None:
    settings = ("sleep.recompute=none", "sleep.passes=2", "data.sequence=64", "sleep.window=16")
    truncated, whole, graphs = (
        planned(text(*settings, *more)).steps[0].memory[0].activations
        for more in (("sleep.bptt_windows=1",), (), ("sleep.bptt_windows=1", "train.cuda_graphs=true"))
    )
    assert truncated < whole < graphs
