"""The remaining time: one clock counts it, whatever the clocks of the processes show."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.errors import ConfigError
from sleeptrain.train import trainer
from sleeptrain.train.stopping import seconds_left, skew_line
from tests.parallel.processes import PATIENCE, run_ranks
from tests.parallel.test_train import layout, settings


def test_seconds_left_by_a_length_and_by_the_end_of_a_job() -> None:
    job = {"SLURM_JOB_END_TIME": "5000"}
    assert seconds_left("90m", 60.0, 1e9, job) == 89 * 60
    assert seconds_left("auto", 60.0, 4000.0, job) == 1000 and seconds_left("auto", 60.0, 4000.0, {}) is None
    assert seconds_left(None, 60.0, 4000.0, job) is None
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME=soon"):
        seconds_left("auto", 0.0, 0.0, {"SLURM_JOB_END_TIME": "soon"})


def test_wrong_clocks_are_named_once_a_machine() -> None:
    assert skew_line([("a", 100.0), ("b", 109.0), ("c", 91.0)], 100.0) is None
    line = skew_line([("a", 100.0), ("b", 3700.0), ("b", 3700.0), ("c", 40.0)], 100.0)
    assert line is not None and line.startswith(
        "clocks differ: that of rank 1 on b is +3600 s off, that of rank 3 on c is -60 s off; the end of a Slurm job"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_clock_that_is_an_hour_ahead_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ahead: int
) -> None:
    date = time.time
    monkeypatch.setattr(time, "time", lambda: date() + 3600 * (os.environ.get("RANK") == str(ahead)))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(date()) + 1800))
    config = compose(settings(tmp_path, *layout(1, 1, 1)))
    assert run_ranks(trainer.train, 2, config, timeout=PATIENCE) == [0, 0]
    text = capfd.readouterr().err
    assert text.count("clocks differ") == 1 and f"sleeptrain: warning: clocks differ: that of rank {ahead} on " in text
