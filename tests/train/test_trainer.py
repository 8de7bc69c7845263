"""Runs from a configuration to their end, also with stops, restarts and numbers that are not finite."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config import load_resolved, save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.tasks.rule110 import FIRST_STEPS
from sleeptrain.errors import ConfigError, NonFiniteError
from sleeptrain.model import compiled
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.plan.report import short
from sleeptrain.report.cost import training_flops
from sleeptrain.report.runs import find_runs
from sleeptrain.stop import EXIT_STOPPED
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import read_status
from tests.checkpoint.contents import contents
from tests.parallel.processes import PATIENCE
from tests.runs import on_open

RULE = ("sleep.stop=change", "sleep.stop_threshold=0.235")  # of 3 passes some rows take 2
TIMES = ("time", "tokens_per_second", "passes_per_second", "mfu", "memory_mb", "eta_seconds")


def settings(folder: Path, *more: str) -> list[str]:
    """A run of 12 steps on Rule 110 that takes a second."""
    return [
        "experiment=rule110",
        f"run.root={folder}",
        "run.name=r",
        "data.rule110.width=6",
        "data.rule110.steps=2",
        "data.rule110.validation_samples=16",
        "data.batch=8",
        "model.dim=16",
        "model.ffn_dim=16",
        "sleep.passes=2",
        f"train.tokens={12 * 8 * 7}",
        "train.log_every=1",
        "train.eval_every=5",
        "checkpoint.every=3",
        "wandb.mode=disabled",
        *more,
    ]


def run(folder: Path, *more: str) -> Config:
    config = compose(settings(folder, *more))
    assert trainer.train(config) == 0
    return with_vocabulary(config, FIRST_STEPS)


def records(folder: Path) -> list[dict[str, object]]:
    """The records of steps and evaluations, without the fields that differ between two runs."""
    found = [r for r in read_metrics(folder / "r" / "metrics.jsonl") if "attempt" not in r]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in found]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return contents(checkpoints(folder / "r" / "checkpoints")[-1])["model"]


def test_a_run_leaves_its_config_metrics_and_checkpoint(tmp_path):
    config = run(tmp_path)
    assert load_resolved(tmp_path / "r" / "config.yaml") == config
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert all(r["passes"] == 2 and r["window"] == 6 for r in steps)
    evaluations = [r for r in records(tmp_path) if "eval" in r]
    assert [r["step"] for r in evaluations] == [5, 10, 12]
    assert evaluations[0]["eval"]["loss"]["2"][0] is None, "a window without targets has no loss"
    assert 0 <= evaluations[0]["eval"]["accuracy"]["2"] <= 1
    assert [p.name for p in checkpoints(tmp_path / "r" / "checkpoints")] == ["step-00000009", "step-00000012"]


def losses(folder: Path) -> list[object]:
    return [r["loss"] for r in records(folder) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_run_with_compiled_blocks_learns_the_same(tmp_path, backend, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    run(tmp_path / "eager")
    capsys.readouterr()
    run(tmp_path / "compiled", "train.compile=true")
    lines = capsys.readouterr().err
    assert "the first step compiles each kind of block" in lines
    assert "graphs of blocks compiled in" in lines
    assert "the first step's matrix products ran in float32" in lines, "they are seen in compiled code too"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    run(tmp_path)
    before = records(tmp_path)
    run(tmp_path)
    assert records(tmp_path) == before
    assert "r is complete: 12 steps, 672 tokens" in capsys.readouterr().err


def test_a_run_prints_its_expected_cost_when_it_begins(tmp_path, capsys):
    """The line has the FLOPs that the report counts later, and is not printed again when the run goes on."""
    config = run(tmp_path, f"train.tokens={6 * 8 * 7}")
    stderr = capsys.readouterr().err
    [found], _ = find_runs([tmp_path / "r"])
    flops = max(training_flops(config, found.records).values())
    assert f"about 6 steps, 336 tokens and {short(flops)} FLOPs" in stderr
    assert stderr.startswith(f"r: {short(sum(p.numel() for p in Hybrid(config.model).parameters()))} parameters")
    run(tmp_path, "run.allow_changes=[train.tokens]")
    assert "about" not in capsys.readouterr().err


def test_a_changed_setting_is_refused_where_it_changes_the_run(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run with other settings") as refused:
        run(tmp_path, "optim.muon_lr=0.5")
    assert refused.value.details == ("optim.muon_lr: 0.002 -> 0.5",)
    run(tmp_path, "checkpoint.every=4", "wandb.project=other")


def start(folder: Path, *more: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sleeptrain", "train", *settings(folder, *more)],
        stderr=stderr,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    path, deadline = folder / "r" / "metrics.jsonl", time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if any(json.loads(line).get("step", 0) >= step for line in lines if line.endswith("}")):
            return
        time.sleep(0.005)


@pytest.mark.parametrize(("seed", "rule"), [(0, ()), (1, RULE)], ids=["fixed", "rule"])
@pytest.mark.slow
def test_killed_at_a_random_step_and_restarted_equals_an_undisturbed_run(tmp_path, seed, rule):
    """Law 5: metrics and weights to the last bit, over changes of N and of the batch, also where rows stop alone."""
    more = ("sleep.curriculum=[{tokens: 280, passes: 3}, {tokens: 400, batch: 4}]", *rule)
    undisturbed, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(undisturbed, *more).wait(timeout=PATIENCE) == 0
    process = start(killed, *more)
    try:
        wait_for_step(killed, random.Random(seed).randint(1, 12), process)
    finally:
        process.kill()
        ended = process.wait()
    status = read_status(killed / "r")
    assert status is not None and status["state"] == ("running" if ended else "finished"), "nobody could say otherwise"
    assert start(killed, *more).wait(timeout=PATIENCE) == 0
    assert records(killed) == records(undisturbed)
    a, b = weights(killed), weights(undisturbed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    process = start(tmp_path, "checkpoint.every=0", f"train.tokens={10_000 * 56}")
    try:
        wait_for_step(tmp_path, 3, process)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == EXIT_STOPPED
    finally:
        process.kill()
    saved = contents(checkpoints(tmp_path / "r" / "checkpoints")[-1])
    assert saved["step"] >= 3
    assert records(tmp_path)[-1]["step"] == saved["step"]


@pytest.mark.slow
def test_a_signal_ends_a_whole_sweep(tmp_path):
    process = start(tmp_path, "-m", "train.seed=0,1", f"train.tokens={10_000 * 56}")
    jobs, deadline = tmp_path / "multirun" / "r", time.monotonic() + PATIENCE
    try:
        while not list(jobs.glob("*seed=0*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
        assert process.wait(timeout=PATIENCE) == EXIT_STOPPED
    finally:
        process.kill()
    assert list(jobs.glob("*seed=0*/checkpoints/step-*"))
    assert not list(jobs.glob("*seed=1*"))


@pytest.fixture
def broken(monkeypatch):
    """A model with a recurrence that overflows in the third step."""

    def break_it(made: Run) -> None:
        calls = {"n": 0}

        def hook(module, inputs, output):
            features, state = output
            calls["n"] = made.step
            if made.step == 2 and features is not None:
                return features * torch.inf, state
            return output

        made.model.blocks[1].register_forward_hook(hook, prepend=True)

    on_open(monkeypatch, break_it)


def test_a_step_that_is_not_finite_stops_the_run_and_is_named(tmp_path, broken):
    config = compose(settings(tmp_path))
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan.*window \d, pass \d, layer 1"):
        trainer.train(config)
    assert records(tmp_path)[-1]["step"] == 2
    assert all(bool(w.isfinite().all()) for w in weights(tmp_path).values())


def test_it_is_skipped_and_counted_on_request(tmp_path, broken, capsys):
    run(tmp_path, "health.on_nonfinite=skip")
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert [r["skipped"] for r in steps] == [0, 0] + [1] * 10
    assert "skipped step 3" in capsys.readouterr().err
    assert all(bool(w.isfinite().all()) for w in weights(tmp_path).values())


def test_memory_carried_in_the_middle_of_a_document_survives_a_restart(tmp_path, tiny_shards):
    """A document goes on after the step where the run stops: its S is in the checkpoint, and is used."""
    more = (*tiny_shards, "sleep.passes=2", "checkpoint.every=1", "checkpoint.keep=1000")
    run(tmp_path / "whole", *more)
    saved = checkpoints(tmp_path / "whole" / "r" / "checkpoints")
    middle = next(p for p in saved if contents(p)["carried"] and contents(p)["step"] > 2)
    assert_gone_on_to_the_same_weights(tmp_path, middle)


def test_a_run_under_a_stop_rule_goes_on_bit_for_bit(tmp_path):
    run(tmp_path / "whole", "sleep.passes=3", *RULE)
    middle, _ = checkpoints(tmp_path / "whole" / "r" / "checkpoints")
    assert_gone_on_to_the_same_weights(tmp_path, middle)
    found, whole = records(tmp_path / "stopped"), records(tmp_path / "whole")
    assert found == [r for r in whole if r["step"] > 9] and len(found) == 5, "three steps and two evaluations"
    flops = [r["flops"] for r in whole if "loss" in r]
    assert len({b - a for a, b in pairwise(flops)}) > 3, "another number of rows goes on in each step"


def assert_gone_on_to_the_same_weights(tmp_path: Path, middle: Path) -> None:
    """A run that begins with this checkpoint of the run `whole`, in the folder `stopped`, ends with its weights."""
    stopped = tmp_path / "stopped" / "r"
    (stopped / "checkpoints").mkdir(parents=True)
    shutil.copytree(middle, stopped / "checkpoints" / middle.name)
    config = load_resolved(tmp_path / "whole" / "r" / "config.yaml")
    config.run.root = str(tmp_path / "stopped")
    save_resolved(config, stopped / "config.yaml")
    assert trainer.train(config) == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[name], b[name]) for name in a)
