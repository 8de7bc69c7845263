"""The repository's batch scripts on a real Slurm of virtual nodes: which runs they start, and which they refuse."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from local_slurm import Cluster

from tests.slurm.jobs import ROOT, SMALL, STEPS, Job, Jobs, check_same, records

pytestmark = pytest.mark.slurm


@pytest.mark.timeout(1200)
def test_a_job_trains_what_a_run_without_slurm_trains(jobs: Jobs, undisturbed: Path) -> None:
    job = jobs.submit(DOCTOR="on")
    job.check_completed(attempts=1)
    check_same(job.run, undisturbed)
    (attempt,) = job.attempts
    assert (attempt["hosts"], attempt["processes"]) == (["node1", "node2"], 4)
    assert "r is finished" in job.log
    assert len(re.findall(r"^node[12]: ok \(", job.log, re.MULTILINE)) == 2, job.log
    assert f"in all {STEPS} steps" in job.log, "the plan stands at the head of the log"


@pytest.mark.timeout(1200)
def test_a_notice_and_a_lost_node(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    """After the notice all save at one step and the job is queued again; after the loss it continues on other nodes."""
    job = jobs.submit()
    job.wait_for_step(5)
    job.notice()
    job.wait_for_step(35, attempt=2)
    assert "SIGUSR1" in job.log and "ended with code 75" in job.log
    cluster.ask("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.check_completed(attempts=3)
    check_same(job.run, undisturbed)
    assert [a["processes"] for a in job.attempts] == [4, 4, 4]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("train.micro_bach=1",), "did you mean 'train.micro_batch'?"),
        (("parallel.tensor=3",), "parallel.tensor"),
        (("data=stdlib", "sleep.when=every", "data.shards.sources=[{train: gone, validation: gone}]"), "gone"),
    ],
    ids=["setting", "layout", "data"],
)
def test_a_mistake_ends_the_job_at_once(jobs: Jobs, settings: tuple[str, ...], why: str) -> None:
    job = jobs.submit(*settings)
    assert job.end() == ("FAILED", "2"), job.log
    assert job.facts["Restarts"] == "0"
    lines = [line for line in job.log.splitlines() if line.startswith("sleeptrain: ")]
    assert len(lines) == 1 and why in lines[0], job.log
    assert "not queued again" in job.log
    assert not job.run.exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_is_not_fit_ends_the_job_at_once(jobs: Jobs) -> None:
    """Both nodes lack the data; with a set vocabulary, nothing reads the data before the doctor does."""
    data = ("data=stdlib", "sleep.when=every", "data.shards.sources=[{train: gone, validation: gone}]")
    job = jobs.submit(*data, "model.vocab_size=64", DOCTOR="on")
    assert job.end() == ("FAILED", "1"), job.log
    lines = re.findall(r"^node[12]: FAILED data: .*; make it with tools/prepare.py$", job.log, re.MULTILINE)
    assert len(lines) == 2 and "a node is not fit" in job.log and not job.run.exists(), job.log


def test_the_scripts_fit_a_cluster_as_they_are(cluster: Cluster) -> None:
    """Slurm accepts them as jobs that it could run: 8 tasks and 8 GPUs a node. Nothing is started."""
    for script in ("pretrain_2b", "continue_qwen3_5_2b", "rule110_sweep"):
        done = subprocess.run(
            ["sbatch", "--test-only", f"slurm/{script}.sh"],
            env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_ends_with_one_report(jobs: Jobs) -> None:
    """Two numbers of passes, one task each; the last task writes the report."""
    one = (*SMALL, "--array=0-1", "--job-name=sweep", f"--output={jobs.folder / '%a.log'}")
    array = jobs.submit(flags=one, script="rule110_sweep", PASSES="1 2", SEEDS="1").number
    states = [Job(jobs.cluster, f"{array}_{task}", jobs.folder).end() for task in (0, 1)]
    logs = [(jobs.folder / f"{task}.log").read_text() for task in (0, 1)]
    assert states == [("COMPLETED", "0")] * 2, logs
    assert (jobs.folder / "report" / "rule110-accuracy.png").stat().st_size > 10_000
    assert sum("N=2 is " in text for text in logs) >= 1, logs
    for name in ("n1-seed0", "n2-seed0"):
        assert max(r["step"] for r in records(jobs.folder / name)) == STEPS
