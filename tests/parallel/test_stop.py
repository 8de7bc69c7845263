"""A run over several processes stops as one, whichever process gets the signal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.stop import EXIT_STOPPED, Stopped
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.status import read_status
from sleeptrain.watch.progress import Location, Phase
from tests.checkpoint.contents import contents
from tests.parallel.processes import PATIENCE, run_ranks
from tests.parallel.test_train import layout, records, settings
from tests.train.test_spawn import LONG, started, wait_for_steps, workers_of
from tests.train.test_stop import signalled

pytestmark = pytest.mark.usefixtures("imported")


def stopped_by_signal(rank: int, place: Location, *arguments: str) -> int | None:
    """Train on this rank while rank `rank` gets a signal; return the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == rank:
            signalled(patch, place, signal.SIGUSR1)
        try:
            return trainer.train(compose(list(arguments)))
        except Stopped as end:
            return int(str(end.code))


def status(folder: Path) -> dict[str, Any]:
    found = read_status(folder / "r")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("rank", "place", "step"),
    [(2, Location(2, Phase.BACKWARD, 1, 2), 2), (3, Location(1, Phase.EVALUATION), 1)],
    ids=["step", "evaluation"],
)
@pytest.mark.slow
def test_a_signal_to_one_of_four_ranks_stops_all(tmp_path: Path, rank: int, place: Location, step: int) -> None:
    """Two stages of two replicas. All stop after the same step, and go on as an uninterrupted run does."""
    more = (*layout(1, 2, 1), "train.micro_batch=2", "train.eval_every=1", "checkpoint.every=0")
    uncut, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_ranks(stopped_by_signal, 4, -1, place, *settings(uncut, *more)) == [0] * 4
    assert run_ranks(stopped_by_signal, 4, rank, place, *settings(stopped, *more)) == [EXIT_STOPPED] * 4
    found = status(stopped)
    assert (found["state"], found["reason"], found["step"]) == ("stopped", f"SIGUSR1 to rank {rank}", step)
    assert found["attempt"]["hosts"] == [socket.gethostname()] and found["attempt"]["processes"] == 4
    assert run_ranks(stopped_by_signal, 4, -1, place, *settings(stopped, *more)) == [0] * 4
    assert without_times(stopped) == without_times(uncut)


def without_times(folder: Path) -> list[dict[str, Any]]:
    kept = ("step", "tokens", "loss", "grad_norm", "eval")
    return [{key: record[key] for key in kept if key in record} for record in records(folder)]


@pytest.mark.slow
def test_a_signal_to_a_worker_stops_all(tmp_path: Path) -> None:
    with started(tmp_path, LONG) as process:
        wait_for_steps(tmp_path, process)
        workers_of(process)[1].send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_STOPPED, stderr
    assert "SIGTERM to rank 1: saved at step" in stderr and "failed" not in stderr
    assert status(tmp_path)["step"] == contents(checkpoints(tmp_path / "r" / "checkpoints")[-1])["step"]


@pytest.mark.slow
def test_signals_while_workers_are_started_are_not_lost(tmp_path: Path) -> None:
    """The signal kills no worker that does not listen yet, and no worker misses it."""
    with started(tmp_path, LONG) as process:
        while not psutil.Process(process.pid).children():
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_STOPPED, stderr
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", 0)


@pytest.mark.slow
def test_the_status_knows_of_a_leader_that_was_killed(tmp_path: Path) -> None:
    with started(tmp_path, LONG) as process:
        wait_for_steps(tmp_path, process)
        workers_of(process)[0].kill()
        process.communicate(timeout=PATIENCE)
    found = status(tmp_path)
    assert (found["state"], found["exit_code"]) == ("failed", 137) and "rank 0 was ended by SIGKILL" in found["reason"]


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """torchrun hides the exit code of the workers; the run folder has it."""
    arguments = settings(tmp_path, "train.micro_batch=4", "checkpoint.every=0", LONG)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sleeptrain", "train"]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    try:
        wait_for_steps(tmp_path, process)
        process.terminate()
        _, stderr = process.communicate(timeout=PATIENCE)
    finally:
        for one in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            one.kill()
        process.kill()
    assert process.returncode != EXIT_STOPPED
    found = status(tmp_path)
    assert (found["state"], found["exit_code"], found["reason"]) == ("stopped", EXIT_STOPPED, "SIGTERM"), stderr
    assert read_metrics(tmp_path / "r" / "metrics.jsonl")[-1]["step"] == found["step"]
