"""The trainer does what `sleeptrain plan` predicts, and a layout's needs follow from the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.distributed.gpus import GPUS, find_gpu
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.parallel.layout_check import check_layout, too_few_micro_batches
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.stage_split import schedule_costs, split_stages
from sleeptrain.plan.report import to_json, to_text
from tests.plan.planned import planned, text


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
    pytest.param("pretrain_30b", 256, 2**22, marks=pytest.mark.slow),
    ("pretrain_30b", 1024, 2**22),
    pytest.param("pretrain_70b", 256, 2**22, marks=pytest.mark.slow),
    ("pretrain_70b", 1024, 2**22),
]


@pytest.mark.parametrize(("experiment", "processes", "tokens"), CLUSTERS)
def test_the_stock_clusters_have_a_layout(experiment: str, processes: int, tokens: int) -> None:
    """Clusters of 32, 256 and 1,024 GPUs; the tokens of a step stay the same where a model can be cut so far."""
    config = compose([f"experiment={experiment}"])
    plan = planned(config, processes, "H200")
    assert {s.workload.tokens for s in plan.steps} == {tokens}
    assert plan.warning is None and "fits" in to_text(plan)
    assert config.parallel.tensor <= 8, "a model is shared inside a machine"


@pytest.mark.parametrize(("processes", "tensor", "micro_batch"), [(256, 2, 1), (1024, 8, 1)])
def test_the_advice_for_too_few_rows_keeps_their_number(processes: int, tensor: int, micro_batch: int) -> None:
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


def test_the_bubble_is_the_simulators():
    config = text("parallel.pipeline=2", "train.micro_batch=4", "sleep.passes=2")
    [step] = planned(config, 2).steps
    stages, costs = split_stages(config, 2), schedule_costs(config)
    simulation = simulate(schedule([step.workload.rounds] * 4, stages, costs), costs)
    assert step.simulation.bubble == simulation.bubble > 0
    assert step.simulation.peak_live_rounds == simulation.peak_live_rounds
    assert to_json(planned(config, 2))["stages"][0]["bubble"] == simulation.bubble


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


@pytest.mark.slow
def test_a_plan_needs_no_tokenizer_of_a_task(tmp_path: Path) -> None:
    """The tokenizer of an imported model does not exist yet when a run is planned. The plan states the lengths."""
    settings = [f"{name}={value}" for name, value in {"min_tokens": 96, "max_tokens": 160}.items()]
    settings = [f"data.gsm_infinite.{setting}" for setting in settings]
    settings += ["experiment=gsm_small", "model.vocab_size=300", f"data.gsm_infinite.tokenizer={tmp_path / 'none'}"]
    plan = planned(compose(settings))
    assert plan.steps[0].workload.tokens == pytest.approx(128 * 128, rel=0.1)
    assert f"{tmp_path / 'none'} does not exist" in to_text(plan)
    with pytest.raises(DataError, match="none: No such file"):
        planned(compose([*settings, "model.vocab_size=0"]))
