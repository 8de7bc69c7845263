"""The work of a step in a plan is the work of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.data.batch import IGNORE, PAD
from sleeptrain.data.source import build_source
from sleeptrain.data.tasks.build import build_task
from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.plan.workload import lacks_tokenizer, reachable, typical_batch, workloads
from sleeptrain.sleep.recompute import MODES
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.sleep.step import forward_backward, step_context
from tests.plan.planned import planned, rule110, text


@pytest.mark.parametrize(
    "more", [[], ["sleep.core=[1,2]"], ["sleep.eviction=sliding"], ["sleep.feedback=none"], ["train.micro_batch=2"]]
)
def test_rounds_and_flops_are_those_of_a_step(more):
    config = rule110(*more)
    [step] = planned(config).steps
    model, work = Hybrid(config.model), step.workload
    result = forward_backward(
        step_context(config, work.shape, model), model, build_source(config.data).batch(8), work.shape, None
    )
    assert (work.num_rounds, step.flops) == (result.num_rounds, result.flops)
    assert work.num_steps == 12


def test_stages_follow_the_curriculum():
    config = rule110("sleep.curriculum=[{tokens: 280, passes: 4}, {tokens: 400, batch: 4}, {tokens: 10000, passes: 9}]")
    steps = planned(config).steps
    shapes = [s.workload.shape for s in steps]
    assert [(s.passes, s.batch) for s in shapes] == [(3, 8), (4, 8), (4, 4)]
    assert [s.workload.num_steps for s in steps] == [5, 3, 8]
    assert steps[1].flops > steps[0].flops > 0


def test_sampled_passes_count_as_the_largest_number():
    [step] = planned(rule110("sleep.sample_passes=true")).steps
    assert step.workload.shape.passes == 3


@pytest.mark.parametrize(
    ("mode", "repeated"),
    [("none", 0), ("selective", 0), ("block", 1), ("pass", 1), ("window", 2)],
    ids=["none", "selective", "block", "pass", "window"],
)
def test_recomputation_is_counted_separately(mode, repeated):
    config = text(f"sleep.recompute={mode}", "sleep.passes=1", "model.tie_embeddings=false", "data.sequence=128")
    [step] = planned(config).steps
    head = 2 * 128 * 1000 * step.workload.tokens if mode == "block" else 0
    # One window of one round: with recompute=window nothing comes before its last round.
    expected = {0: 0, 1: step.flops / 3 - head, 2: step.flops / 3}[repeated]
    assert step.recompute_flops == expected


def test_a_loss_of_some_rows_at_a_time_runs_the_head_again_once_in_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipeline a second time, with its round."""
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", 4 * 1000)
    more = ("sleep.passes=1", "data.sequence=128", "train.micro_batch=4")
    for mode in MODES:
        [step] = planned(text(f"sleep.recompute={mode}", *more)).steps
        head = 2 * 128 * 1000 * step.workload.tokens
        blocks = 0 if mode in ("none", "selective") else step.flops / 3 - head
        assert step.recompute_flops == blocks + head
    [step] = planned(text(*more, "parallel.pipeline=2"), 2).steps
    assert step.recompute_flops == step.flops / 3 + head


def test_windows_are_run_again_up_to_their_last_round():
    def again(mode: str) -> int:
        return planned(text(f"sleep.recompute={mode}", "sleep.passes=3")).steps[0].recompute_flops

    assert again("pass") < again("window") < 2 * again("pass")


@pytest.mark.slow
def test_pads_of_a_task_are_no_tokens_of_a_step() -> None:
    """Rows of Depo are shorter than the longest one: only tokens that are no pads count for the steps."""
    config = compose(["experiment=depo_small"])
    [work] = workloads(config, 1)
    batch = build_task(config.data).rows(config.data.seed, 0, 20_000)
    assert work.tokens == pytest.approx(int((batch.documents_BT != PAD).sum()) * 128 / 20_000, rel=0.005)
    assert work.num_steps == -(-config.train.tokens // work.tokens)


def test_rounds_without_a_loss_have_no_targets() -> None:
    [step] = planned(text("sleep.passes=2", "train.micro_batch=4")).steps
    work = step.workload
    assert work.num_rounds == len(work.rounds) * 4 and len(work.plans) == work.num_micros == 4
    assert sum(work.targets_of(r) for r in work.rounds) == pytest.approx(work.num_targets, abs=len(work.rounds))
    assert all((work.targets_of(r) > 0) is r.loss for r in work.rounds)


@pytest.mark.parametrize(
    ("source", "exists", "lacks"),
    [("gsm_infinite", False, True), ("gsm_infinite", True, False), ("rule110", False, False)],
)
def test_only_a_task_whose_tokenizer_does_not_exist_lacks_it(
    tmp_path: Path, source: str, exists: bool, lacks: bool
) -> None:
    named = tmp_path / "tokenizer"
    if exists:
        named.touch()
    data = compose([f"data.source={source}", "experiment=rule110", f"data.gsm_infinite.tokenizer={named}"]).data
    assert lacks_tokenizer(data) is lacks
    assert reachable(data).gsm_infinite.tokenizer == ("" if lacks else str(named))


def test_rows_of_text_are_planned_as_one() -> None:
    config = text("sleep.passes=2", "train.micro_batch=4", "sleep.window=256")
    [workload] = workloads(config, 1)
    batch = typical_batch(config, 4)
    whole = plan_batch(batch, config.sleep.window, 2, config.sleep)
    assert list(workload.rounds) == whole and [r.work for r in workload.rounds] == [r.work for r in whole]
    assert workload.num_targets == int((batch.targets_BT != IGNORE).sum())
