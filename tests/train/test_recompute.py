"""The recomputation mode of each stage of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.plan.recompute import SHARE, Choice, choose_stages
from sleeptrain.train import recompute
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.recompute import RecomputeStages, recompute_stages
from sleeptrain.train.run_state import Run
from sleeptrain.train.trainer import train
from tests.checkpoint.worlds import alone
from tests.plan.planned import text
from tests.train.test_trainer import settings

GIB = 2**30
STAGES = RecomputeStages(
    [
        (0, Choice("none", 5 * GIB)),
        (10_000, Choice("selective", 6 * GIB)),
        (20_000, Choice("selective", 7 * GIB)),
        (30_000, Choice("window", 9 * GIB, fits=False)),
    ],
    8 * GIB,
)


def test_the_mode_changes_with_the_stage() -> None:
    modes = [STAGES.at(tokens) for tokens in (0, 9_999, 10_000, 29_999, 30_000, 10**9)]
    assert modes == ["none", "none", "selective", "selective", "window", "window"]


def test_one_line_says_the_choice_and_warns_if_nothing_fits() -> None:
    line = STAGES.line()
    assert line is not None and line.startswith("warning: sleep.recompute=auto, of 8 GiB a process: none (5 GiB) from")
    assert "selective (6 GiB) from token 10k, window (9 GiB) from token 30k; the last does not fit" in line
    fitting = RecomputeStages([(0, Choice("pass", GIB))], 8 * GIB)
    assert fitting.line() == "sleep.recompute=auto, of 8 GiB a process: pass (1 GiB) from token 0"


def test_a_mode_that_is_set_is_not_said_and_no_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "least_memory", lambda _: pytest.fail("reads the memory"))
    stages = recompute_stages(text("sleep.recompute=block"), alone())
    assert stages.line() is None and stages.at(0) == stages.at(10**9) == "block"


def test_a_run_chooses_at_its_start_and_its_numbers_are_those_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N rises in the run, and with little memory the mode changes with it."""
    more = ("sleep.passes=1", "sleep.curriculum=[{tokens: 280, passes: 8}]", "data.rule110.steps=2")
    said: list[str] = []
    monkeypatch.setattr(Run, "message", lambda _, line: said.append(line))
    config = compose(settings(tmp_path / "auto", *more, "sleep.recompute=auto", "model.vocab_size=5"))
    [(_, first), _] = choose_stages(config, 1, 10**15, kernels=False)
    monkeypatch.setattr(recompute, "least_memory", lambda _: first.total / SHARE)
    train(compose(settings(tmp_path / "auto", *more, "sleep.recompute=auto")))
    [line] = [line for line in said if "sleep.recompute" in line]
    assert "none (" in line and "from token 280" in line
    train(compose(settings(tmp_path / "none", *more)))
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name / "r" / "metrics.jsonl") if "loss" in record]
        for name in ("auto", "none")
    ]
    assert len(losses[0]) == 12 and losses[0] == losses[1]
