"""Real ranks hold and send what a plan predicts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.parallel.zero import limits
from sleeptrain.plan.layout import make_plan
from tests.parallel.processes import run_ranks
from tests.plan.measured import measure

MODEL = (
    "run.name=r",
    "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet]",
    "model.dim=16",
    "model.ffn_dim=24",
    "model.attention.head_dim=8",
    "train.device=cpu",
    "train.tokens=4000",
    "sleep.passes=3",
    "model.vocab_size=17",
)
RULE110 = ("experiment=rule110", "data.rule110.width=6", "data.rule110.steps=2", "data.batch=8")
TEXT = (
    "experiment=stdlib",
    "sleep.curriculum=[]",
    "optim.warmup_fraction=0",
    "data.batch=4",
    "data.sequence=40",
    "sleep.window=16",
)


pytestmark = pytest.mark.usefixtures("imported")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def layout(tensor: int, pipeline: int, data: int, zero: int) -> tuple[list[str], int]:
    parallel = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero={zero}"]
    return parallel, tensor * pipeline * data


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "zero", "more"),
    [
        slow(2, 1, 1, 1, ()),
        (2, 1, 1, 1, ("sleep.recompute=block", "train.micro_batch=4", "sleep.core=[1,3]")),
        slow(2, 1, 1, 1, ("sleep.recompute=window", "train.precision=bf16")),
        slow(2, 1, 1, 1, ("sleep.recompute=selective",)),
        slow(1, 2, 1, 1, ("train.micro_batch=2",)),
        slow(2, 2, 1, 1, ("train.micro_batch=2", "sleep.core=[0,2]")),
        slow(2, 2, 1, 1, ("train.micro_batch=2", "train.precision=bf16", "train.residual=bf16")),
        slow(1, 2, 2, 1, ("train.micro_batch=1", "model.tie_embeddings=false", "sleep.feedback=none")),
        slow(1, 2, 2, 2, ("train.micro_batch=1",)),
        (2, 2, 1, 1, ("train.micro_batch=2", "parallel.split_head=true")),
        slow(1, 4, 1, 1, ("train.micro_batch=1", "parallel.split_head=true", "model.tie_embeddings=false")),
        slow(1, 2, 2, 1, ("train.micro_batch=1", "parallel.split_head=true", "train.precision=bf16")),
        (1, 1, 2, 0, ()),
        slow(1, 1, 2, 1, ("train.micro_batch=2",)),
        (1, 1, 2, 1, ("train.precision=bf16", "model.tie_embeddings=false")),
        slow(1, 2, 2, 1, ("train.precision=bf16", "train.micro_batch=1")),
        (1, 1, 4, 1, ("parallel.shard_replicas=2",)),
        slow(2, 1, 4, 1, ("parallel.shard_replicas=2", "train.precision=bf16")),
        slow(1, 1, 3, 2, ("train.micro_batch=1", "data.batch=6")),
        slow(1, 1, 2, 3, ()),
        slow(2, 1, 2, 3, ()),
    ],
)
def test_ranks_do_what_a_plan_predicts(tensor: int, pipeline: int, data: int, zero: int, more: tuple[str, ...]) -> None:
    parallel, ranks = layout(tensor, pipeline, data, zero)
    check(compose([*RULE110, *MODEL, *parallel, *more]), ranks)


@pytest.mark.slow
def test_a_loss_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", 16)
    parallel, ranks = layout(2, 1, 1, 1)
    check(compose([*TEXT, *MODEL, *parallel, "sleep.recompute=pass"]), ranks)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "more"),
    [
        (2, 1, ("parallel.sequence=true", "sleep.recompute=pass", "sleep.core=[1,3]")),
        slow(2, 1, ("parallel.sequence=true", "train.precision=bf16")),
        slow(2, 1, ("parallel.sequence=true", "sleep.recompute=selective")),
        slow(2, 1, ("parallel.sequence=true", "train.precision=bf16", "train.residual=bf16")),
        slow(1, 2, ("train.micro_batch=1",)),
        slow(1, 2, ("train.micro_batch=1", "parallel.split_head=true")),
        slow(1, 2, ("train.micro_batch=2", "sleep.bptt_windows=1")),
        slow(2, 1, ("train.micro_batch=2", "sleep.bptt_windows=1")),
        slow(2, 2, ("train.micro_batch=2", "parallel.sequence=true")),
    ],
)
def test_rows_that_go_on(tensor: int, pipeline: int, more: tuple[str, ...]) -> None:
    """Memory is carried into the step, and sleep after the last loss is not trained."""
    parallel, ranks = layout(tensor, pipeline, 1, 1)
    check(compose([*TEXT, *MODEL, *parallel, *more]), ranks)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "more"),
    [
        (2, 1, ("parallel.sequence=true",)),
        slow(1, 2, ("train.micro_batch=2",)),
    ],
)
def test_jet_and_the_options_of_blocks(tensor: int, pipeline: int, more: tuple[str, ...]) -> None:
    parallel, ranks = layout(tensor, pipeline, 1, 1)
    blocks = (
        "model.layers=[attention,jet,sliding_attention,jet]",
        "model.mixer_only=[1]",
        "model.sandwich_norms=true",
        "model.norm_between_passes=true",
        "model.attention.qkv_bias=true",
        "model.attention.sliding_window=5",
    )
    check(compose([*TEXT, *MODEL, *blocks, *parallel, *more]), ranks)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("tensor", "reuse", "more"),
    [
        pytest.param(1, 0, ("sleep.recompute=none",), marks=pytest.mark.slow),
        (1, 0, ("sleep.recompute=pass", "model.tie_embeddings=false", "model.sandwich_norms=true")),
        slow(2, 0, ("sleep.recompute=block", "sleep.core=[1,3]")),
        pytest.param(
            1, 0, ("sleep.recompute=window", "sleep.when=every", "model.tie_embeddings=false"), marks=pytest.mark.slow
        ),
        pytest.param(1, 0, ("sleep.recompute=pass", "sleep.core=[0,3]"), marks=pytest.mark.slow),
        slow(1, 12_000, ("sleep.recompute=pass", "sleep.core=[0,3]")),
        pytest.param(
            1, 0, ("sleep.recompute=none", "model.layers=[jet,sliding_attention,jet]"), marks=pytest.mark.slow
        ),
    ],
)
def test_zero_3_gathers_as_planned(
    tensor: int, reuse: int, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several rounds, with weights that are too large to stay, as in large models."""
    monkeypatch.setattr(limits, "MAX_REUSE", reuse)
    monkeypatch.setattr(limits, "PERSISTENT", 0)
    monkeypatch.setattr(limits, "AHEAD", 0)
    parallel, ranks = layout(tensor, 1, 2, 3)
    check(compose([*RULE110, *MODEL, *parallel, *more]), ranks)


def check(config: Config, ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = run_ranks(measure, ranks, config, patch)
    plan = make_plan(config, ranks, None, 0.4)
    [step], zero_stage = plan.steps, config.parallel.zero
    for stage, memory in enumerate(step.memory):
        ours = [rank for rank in found if rank["stage"] == stage]
        for kind in ("weights", "master", "gradients", "optimizer"):
            assert asdict(memory)[kind] == max(rank[kind] for rank in ours), f"{kind} of stage {stage}"
        if config.parallel.pipeline > 1:
            assert memory.boundary == ours[0]["boundary"]
            sent = {b: n for (a, b), n in step.pipeline.items() if a == stage}
            assert sent == ours[0]["sent"]
        if config.parallel.tensor > 1:
            assert dict(step.tensor[stage].total) == ours[0]["tensor"]
        if plan.replicas > 1:
            assert step.data[stage].exchange == max(rank["exchange"] for rank in ours)
            if zero_stage == 3:  # if only some weights stay, the order inside a block matters
                gathered, exact = step.data[stage].gather["all_gather"], limits.MAX_REUSE in (0, 10**9)
                assert gathered == (ours[0]["gather"] if exact else pytest.approx(ours[0]["gather"], rel=0.01))
            if zero_stage == 1:
                assert ours[0]["reduce"] == step.data[stage].reduce["reduce_scatter"]
                assert ours[0]["gather"] == step.data[stage].gather["all_gather"]
                if plan.config.parallel.shard_replicas:
                    assert ours[0]["copies"] == step.data[stage].copies["all_reduce"]
            elif zero_stage < 3:  # DeepSpeed's norms and the alignment of its buckets are a few bytes more
                assert ours[0]["reduce"] == pytest.approx(step.data[stage].reduce["all_reduce"], rel=1e-3, abs=64)
    assert step.flops == found[0]["flops"]
    assert step.workload.num_rounds == found[0]["rounds"]
