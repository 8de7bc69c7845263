"""Jobs that are disturbed in all the ways that a cluster has: each comes to the end of the run that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from local_slurm import Cluster

from tests.slurm.jobs import NODES, SETTINGS, SMALL, STEPS, Jobs, check_same, ranks_on

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]


def test_three_notices(jobs: Jobs, undisturbed: Path) -> None:
    job = jobs.submit()
    for attempt, step in enumerate((5, 25, 45), start=1):
        job.wait_for_step(step, attempt)
        job.notice()
    job.check_completed(attempts=4)
    check_same(job.run, undisturbed)
    assert job.said.count("ended with code 75") == 3


def test_others_need_the_nodes(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    job = jobs.submit()
    job.wait_for_step(15)
    others = ("--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.ask("sbatch", *others)
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)


def test_a_node_crashes(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    job = jobs.submit()
    job.wait_for_step(15)
    cluster.crash("node2")
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)
    assert "node2" not in job.attempts[1]["hosts"]


def test_a_rank_is_killed_while_the_controller_is_gone(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    job = jobs.submit()
    job.wait_for_step(5)
    cluster.kill_controller()
    job_steps = len(job.steps)
    while len(job.steps) < job_steps + 5:  # it trains on
        pass
    cluster.start_controller()
    job.wait_for_step(15)
    os.kill(ranks_on("node2", cluster)[0], signal.SIGKILL)
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)
    assert "queued again" in job.said


def test_the_time_is_over(jobs: Jobs, undisturbed: Path) -> None:
    """A limit of a minute, with the notice half a minute ahead of it. Slurm gives it up to a minute early."""
    job = jobs.submit("train.log_every=1", flags=(*SMALL, "--time=2", "--signal=B:USR1@60", "--nodes=2", "--ntasks-per-node=2"))
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)


def test_another_number_of_nodes(jobs: Jobs, undisturbed: Path) -> None:
    """4 nodes, 2 and 4 again, each a job of its own that the user stops: same samples, same loss to rounding."""
    for nodes, until in ((4, 15), (2, 35), (4, STEPS)):
        job = jobs.submit(flags=(*SMALL, f"--nodes={nodes}", "--ntasks-per-node=1"))
        if until < STEPS:
            job.wait_for_step(until, attempt=(4, 2).index(nodes) + 1)
            job.cluster.ask("scontrol", "update", f"JobId={job.number}", "Requeue=0")
            job.notice()
            assert job.end() == ("FAILED", "75"), job.said
            assert "may not be queued again" in job.said
    assert job.end() == ("COMPLETED", "0"), job.said


def test_it_is_given_up_where_nothing_is_saved(jobs: Jobs) -> None:
    pass
