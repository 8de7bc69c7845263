"""Training FLOPs by step against the counts of real runs."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sleeptrain.config.schema import Config, CurriculumStage
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.report import cost as cost_module
from sleeptrain.report.cost import training_flops
from sleeptrain.report.records import collect
from sleeptrain.report.runs import find_runs
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.sleep.step import StepResult
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from tests.configs import change
from tests.report.made import STEP, accuracy, attempt, composed, evaluation, make_run, step

SIZES = ("model.dim=16", "model.ffn_dim=16", "data.rule110.validation_samples=8", "wandb.mode=disabled")
TINY = (*SIZES, "train.log_every=2", "train.eval_every=5", "train.threads=1", "train.device=cpu")
CURRICULUM = [CurriculumStage(tokens=3 * STEP, passes=3), CurriculumStage(tokens=7 * STEP, passes=2, batch=4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sleep.passes": 1},
        {"sleep.curriculum": CURRICULUM},
        {"sleep.passes": 4, "sleep.sample_passes": True, "train.micro_batch": 4},
    ],
)
def test_they_equal_the_counts_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    counted = [0]

    class Pace(trainer.Pace):
        def count(self, num_tokens: int, result: StepResult) -> None:
            counted.append(counted[-1] + result.flops)
            super().count(num_tokens, result)

    monkeypatch.setattr(trainer, "Pace", Pace)
    config = change(composed(*TINY, f"run.root={tmp_path}", "run.name=r"), changes)
    assert trainer.train(config) == 0
    records = read_metrics(tmp_path / "r" / "metrics.jsonl")
    found = training_flops(config, collect(records))
    assert all(record["flops"] == counted[record["step"]] for record in records)
    assert len(found) > 4 and found == {at: counted[at] for at in found}
    assert max(found) == len(counted) - 1


def cost(config: Config, passes: int) -> int:
    return MeanRow(config).step_flops(StepShape(passes, 20, 8))


@pytest.mark.slow
def test_records_override_the_settings() -> None:
    config = composed("sleep.passes=4")
    records = [step(2, passes=1), step(4, passes=4), step(6, passes=2)]
    one, two, four = (cost(config, n) for n in (1, 2, 4))
    assert training_flops(config, collect(records)) == {
        0: 0,
        2: 2 * one,
        4: 2 * (one + four),
        6: 2 * (one + four + two),
    }
    assert four > two > one


def test_records_override_the_settings_between_them_too() -> None:
    """Evaluations, norms and attempts record no shape; N was 1 until step 9, but is 4 in the settings."""
    config = composed("sleep.passes=4")
    one, four = cost(config, 1), cost(config, 4)
    records = [
        attempt(1, 0, 100.0),
        accuracy(1, 0.5),
        evaluation(2, {"1": [1.0]}),
        step(4, passes=1),
        evaluation(6, {"1": [1.0]}),
        step(8, passes=1),
        attempt(2, 9, 200.0),
        evaluation(10, {"1": [1.0]}),
        step(12, passes=4),
        evaluation(14, {"1": [1.0]}),
    ]
    expected = {n: n * one for n in (0, 1, 2, 4, 6, 8, 9)} | {n: 9 * one + (n - 9) * four for n in (10, 12, 14)}
    assert training_flops(config, collect(records)) == expected


def test_more_passes_cost_as_in_the_plan() -> None:
    """Only the window of cells sleeps, without the head: N passes, the last only up to the last block's state."""
    config = composed()
    gained = [cost(config, n + 1) - cost(config, n) for n in (2, 3)]
    assert gained[0] == gained[1] > 0


def test_text_is_counted_without_its_files() -> None:
    config = composed("experiment=stdlib", "data.batch=2", "data.sequence=256", "sleep.curriculum=[]")
    records = collect([{"step": 3, "tokens": 3 * 512, "time": 0.0}])
    assert training_flops(config, records)[3] == 3 * MeanRow(config).step_flops(StepShape(1, 128, 2))


@pytest.mark.parametrize("seed", range(4))
def test_records_that_are_skipped_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with ramps and changed settings, which records only some steps."""
    draw = random.Random(seed)
    ramps = [
        CurriculumStage(tokens=40 * STEP, passes=3, ramp="linear"),
        CurriculumStage(tokens=70 * STEP, passes=1, ramp="sqrt"),
        CurriculumStage(tokens=90 * STEP, batch=4),
    ]
    config = change(composed(), {"sleep.curriculum": ramps})
    records, tokens = [], 0
    for number in range(120):
        shape = step_shape(config, tokens, number)
        passes = 2 if 30 < number < 50 else shape.passes
        tokens += 21 * shape.batch
        record = step(number + 1, passes=passes, batch=shape.batch) | {"tokens": tokens}
        records += [record] if draw.random() < 0.8 else []
        records += [evaluation(number + 1, {"1": [1.0]}) | {"tokens": tokens}] if draw.random() < 0.1 else []
        records += [attempt(1, number + 1, 0.0) | {"tokens": tokens}] if draw.random() < 0.1 else []
    found = training_flops(config, collect(records))
    monkeypatch.setattr(cost_module, "_needed", lambda config, records, starts, other: np.ones(records.num_steps, bool))
    every = training_flops(config, collect(records))
    assert found == {at: every[at] for at in found} and len(found) < len(every) - 20


def test_missing_files_of_a_task_are_reported(tmp_path: Path) -> None:
    make_run(tmp_path / "r", ["experiment=gsm_small", "data.gsm_infinite.tokenizer=absent"], [step(1)])
    [run], _ = find_runs([tmp_path])
    assert isinstance(run.flops, str) and "absent" in run.flops and run.flops_until(1) is None
