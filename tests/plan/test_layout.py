"""What `sleeptrain plan` says is what the trainer then does, and what a layout needs follows from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.batch import PAD
from sleeptrain.data.source import build_source
from sleeptrain.data.tasks.build import build_task
from sleeptrain.data.tasks.rule110 import VOCAB_SIZE
from sleeptrain.distributed.gpus import GPUS, Gpu, find_gpu
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.layout_check import check_layout, too_few_micro_batches
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.layout import Plan, make_plan
from sleeptrain.plan.report import to_json, to_text
from sleeptrain.plan.speed import Traffic, Work, forecast
from sleeptrain.plan.update import newton_schulz_flops
from sleeptrain.plan.workload import workloads
from sleeptrain.sleep.step import forward_backward, step_context

SMALL = ["data.rule110.width=6", "data.batch=8", "model.dim=16", "model.ffn_dim=16", f"train.tokens={12 * 8 * 7}"]


def rule110(*more: str) -> Config:
    return with_vocabulary(compose(["experiment=rule110", "sleep.passes=3", *SMALL, *more]), VOCAB_SIZE)


def planned(config: Config, processes: int = 1, gpu: str | None = None) -> Plan:
    return make_plan(config, processes, None if gpu is None else find_gpu(gpu), 0.4)


def text(*more: str) -> Config:
    model = ["model.vocab_size=1000", "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet]"]
    return compose(["experiment=stdlib", "sleep.curriculum=[]", "data.batch=16", *model, *more])


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


def test_sampled_passes_count_as_the_most():
    [step] = planned(rule110("sleep.sample_passes=true")).steps
    assert step.workload.shape.passes == 3


def test_an_unknown_vocabulary_is_refused(tmp_path):
    config = compose(["experiment=stdlib", f"data.shards.sources.0.train={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 0, and the data does not give it: .*none"):
        planned(config)


CLUSTERS = [
    ("pretrain_2b", 32, 2**20),
    ("pretrain_2b_256", 256, 2**20),
    ("pretrain_2b_1024", 1024, 2**22),
    ("pretrain_7b", 32, 2**21),
    ("pretrain_7b_256", 256, 2**21),
    ("pretrain_7b_1024", 1024, 2**21),
]


@pytest.mark.parametrize(("experiment", "processes", "tokens"), CLUSTERS)
def test_the_stock_clusters_have_a_layout(experiment: str, processes: int, tokens: int) -> None:
    """Of 32, 256 and 1,024 GPUs; the tokens of a step stay as they are where a model can be shared so far."""
    config = compose([f"experiment={experiment}"])
    plan = planned(config, processes, "H200")
    assert {s.workload.tokens for s in plan.steps} == {tokens}
    assert plan.warning is None and "fits" in to_text(plan)
    assert config.parallel.tensor <= 8, "a model is shared inside a machine"


@pytest.mark.parametrize(("processes", "tensor", "micro_batch"), [(256, 2, 1), (1024, 8, 1)])
def test_too_few_rows_are_kept_by_what_is_told(processes: int, tensor: int, micro_batch: int) -> None:
    way_out = (
        rf"or keep it by .*{f'parallel.tensor={tensor} and ' if tensor > 2 else ''}train\.micro_batch={micro_batch}$"
    )
    with pytest.raises(ConfigError, match=way_out):
        check_layout(compose(["experiment=pretrain_7b"]), processes)
    more = [f"parallel.tensor={tensor}", f"train.micro_batch={micro_batch}"]
    assert check_layout(compose(["experiment=pretrain_7b", *more]), processes) == processes // tensor


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"must divide the number of processes \(3\)"):
        planned(text("parallel.pipeline=2", "train.micro_batch=2"), 3)


@pytest.mark.parametrize(
    ("mode", "repeated"),
    [("none", 0), ("block", 1), ("pass", 1), ("window", 2)],
    ids=["none", "block", "pass", "window"],
)
def test_what_is_run_again_is_told_apart(mode, repeated):
    config = text(f"sleep.recompute={mode}", "sleep.passes=1", "model.tie_embeddings=false", "data.sequence=128")
    [step] = planned(config).steps
    head = 2 * 128 * 1000 * step.workload.tokens if mode == "block" else 0
    # One window of one round: run again as a window there would be nothing before its last round.
    expected = {0: 0, 1: step.flops / 3 - head, 2: step.flops / 3}[repeated]
    assert step.recompute_flops == expected


def test_windows_are_run_again_up_to_their_last_round():
    def again(mode: str) -> int:
        return planned(text(f"sleep.recompute={mode}", "sleep.passes=3")).steps[0].recompute_flops

    assert again("pass") < again("window") < 2 * again("pass")


def test_the_bubble_is_the_simulators():
    config = text("parallel.pipeline=2", "train.micro_batch=4", "sleep.passes=2")
    [step] = planned(config, 2).steps
    stages, costs = split_stages(config, 2), schedule_costs(config)
    simulation = simulate(schedule([step.workload.rounds] * 4, stages, costs), costs)
    assert step.simulation.bubble == simulation.bubble > 0
    assert step.simulation.peak_live_rounds == simulation.peak_live_rounds
    assert to_json(planned(config, 2))["stages"][0]["bubble"] == simulation.bubble


def test_parameters_of_all_stages_are_those_of_the_model():
    config = text("parallel.pipeline=2", "parallel.tensor=2", "train.micro_batch=4", "model.tie_embeddings=false")
    plan = planned(config, 4)
    with torch.device("meta"):
        whole = sum(p.numel() for p in Hybrid(config.model).parameters())
    assert plan.parameters == whole and plan.embedding_parameters == 2 * 1000 * 128
    held = sum(h.numel for stage in plan.held for h in stage)
    assert whole / 2 < held < 0.51 * whole, "norms alone are held by both tensor ranks"


def test_recomputation_saves_memory_and_grows_no_boundary_with_layers():
    memory = {
        mode: planned(text(f"sleep.recompute={mode}", "sleep.passes=4", "train.micro_batch=4")).steps[0].memory[0]
        for mode in ("none", "block", "pass", "window")
    }
    totals = [memory[mode].total for mode in ("none", "block", "pass", "window")]
    assert totals[0] > totals[1] and totals[0] > totals[2] > totals[3]
    assert memory["none"].boundary == 0 < memory["window"].boundary < memory["pass"].boundary


def test_time_is_work_bubble_and_what_is_sent():
    gpu = Gpu(flops=100.0, memory=1.0, bandwidth=4.0, intra=10.0, inter=1.0)
    far = {"tensor": False, "data": True, "pipeline": False}
    work = Work(flops=300.0, executed=100.0, bubble=0.25, orthogonalised=25.0, state=1.0, tokens=42)
    speed = forecast(gpu, 0.5, 4, work, Traffic(tensor=20.0, data=3.0, tied=5.0, machines=far))
    assert (speed.compute, speed.tensor, speed.bubble, speed.data, speed.update) == (2.0, 2.0, 1.0, 3.5, 1.0)
    assert speed.seconds == 9.5 and speed.tokens_per_second == 42 / 9.5
    assert speed.mfu == pytest.approx(300 / 9.5 / 400)


def test_a_forecast_of_one_process_reaches_the_efficiency():
    speed = planned(text("train.precision=bf16"), gpu="H100").steps[0].speed
    assert speed is not None and speed.mfu * speed.seconds / (speed.seconds - speed.update) == pytest.approx(0.4)
    again = planned(text("sleep.recompute=pass"), gpu="H100").steps[0].speed
    assert again is not None and again.compute / speed.compute == pytest.approx(4 / 3)


def test_the_update_is_shared_by_replicas():
    one, two = (planned(text(), n, "H100").steps[0].speed for n in (1, 2))
    assert one is not None and two is not None and 0.5 < two.update / one.update < 1
    config = text("model.layers=[gated_deltanet]")
    flops = newton_schulz_flops(config, planned(config).held[0], 1)
    c = config.model
    matrices = [(c.dim, c.dim)] * 5 + [(c.dim, c.ffn_dim)] * 3  # q, k, v, z, out; gate, up, down
    assert flops == sum(10 * short * short * (2 * long + short) for short, long in matrices)


def test_gpus():
    assert find_gpu("h200") == ("H200", GPUS["H200"])
    with pytest.raises(ConfigError, match=r"--gpu: unknown GPU 'H2000'; did you mean 'H200'.*A100"):
        find_gpu("H2000")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "1 micro-batch .* train.micro_batch=8"),
        (("train.micro_batch=8",), None),
        (("parallel.pipeline=4", "train.micro_batch=8"), "2 micro-batches .*4 stages.* train.micro_batch=4"),
        (("parallel.pipeline=4", "train.micro_batch=1", "data.batch=2"), "each other; set data.batch=4$"),
        (("sleep.feedback=none",), None),
        (("sleep.passes=1",), None),
        (("sleep.core=[0,2]",), None),
        (("sleep.passes=1", "sleep.curriculum=[{tokens: 5, passes: 2}]"), "train.micro_batch=8"),
        (("train.micro_batch=4", "sleep.curriculum=[{tokens: 5, batch: 4}]"), "train.micro_batch=2"),
        (("parallel.pipeline=1",), None),
    ],
)
def test_too_few_micro_batches_for_the_ring(more, said):
    config = text("parallel.pipeline=2", "sleep.passes=2", *more)
    warning = too_few_micro_batches(config, 1)
    if said is None:
        assert warning is None
    else:
        assert warning is not None
        assert re.search(said, warning), warning


def test_tables_name_units_and_what_is_assumed():
    config = text("parallel.pipeline=2", "sleep.passes=2")
    said = to_text(planned(config, 4, "H200"))
    for part in ("warning   a step has 1 micro-batch", "GiB", "tokens/s/GPU", "MFU", "assumed:", "GPU-hours", "MB"):
        assert part in said
    assert "no forecast of time" in to_text(planned(text()))


def test_pads_of_a_task_are_no_tokens_of_a_step() -> None:
    """Depo's rows are shorter than the longest: the steps are those of the tokens that count."""
    config = compose(["experiment=depo_small"])
    [work] = workloads(config, 1)
    batch = build_task(config.data).rows(config.data.seed, 0, 20_000)
    assert work.tokens == pytest.approx(int((batch.documents_BT != PAD).sum()) * 128 / 20_000, rel=0.005)
    assert work.num_steps == -(-config.train.tokens // work.tokens)


def test_a_plan_needs_no_tokenizer_of_a_task(tmp_path: Path) -> None:
    """What an imported model will bring is not there when a run is planned; lengths are, and the plan says so."""
    settings = [f"{name}={value}" for name, value in {"min_tokens": 96, "max_tokens": 160}.items()]
    settings = [f"data.gsm_infinite.{setting}" for setting in settings]
    settings += ["experiment=gsm_small", "model.vocab_size=300", f"data.gsm_infinite.tokenizer={tmp_path / 'none'}"]
    plan = planned(compose(settings))
    assert plan.steps[0].workload.tokens == pytest.approx(128 * 128, rel=0.1)
    assert f"{tmp_path / 'none'} does not exist" in to_text(plan)
    with pytest.raises(DataError, match="none: No such file"):
        planned(compose([*settings, "model.vocab_size=0"]))
