"""Jobs that a cluster disturbs in every way: each ends as the undisturbed run does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from local_slurm import Cluster

from tests.slurm.jobs import NODES, SMALL, STEPS, TWO_BY_TWO, Jobs, check_alike, check_same, ranks_on

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def test_three_notices(jobs: Jobs, undisturbed: Path) -> None:
    job = jobs.submit()
    next_job = jobs.submit(flags=(*SMALL, "--nodes=1", "--ntasks-per-node=1"))
    for attempt, step in enumerate((5, 25, 45), start=1):
        job.wait_for_step(step, attempt)
        job.notice()
    job.check_completed(attempts=4)
    check_same(job.run, undisturbed)
    assert job.log.count("ended with code 75") == 3
    # The second job waits for the first, and finds that the run is complete.
    assert next_job.end() == ("COMPLETED", "0"), next_job.log
    assert "is complete" in next_job.log and [a["job"] for a in job.attempts] == [job.number] * 4 + [next_job.number]


def test_others_need_the_nodes_and_then_one_crashes(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    job = jobs.submit()
    job.wait_for_step(15)
    others = ("--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.ask("sbatch", *others)
    job.wait_for_step(35, attempt=2)
    assert "asked to save" in job.log
    cluster.crash("node2")
    # Slurm queues the job again when it misses the node; until then the script may go on with the other node alone.
    job.check_completed(attempts=3)
    check_alike(job.run, undisturbed)
    assert "node2" not in job.attempts[2]["hosts"]


@pytest.mark.slow
def test_a_rank_is_killed_after_the_controller_was_gone(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    job = jobs.submit()
    job.wait_for_step(5)
    cluster.kill_controller()
    job.wait_for_step(15)  # the job keeps training
    cluster.start_controller()
    job.wait_for_step(25)
    os.kill(ranks_on("node2", cluster)[0], signal.SIGKILL)
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)
    assert "looks for nodes that are fit" in job.log and "queued again" not in job.log
    assert job.attempts[0]["hosts"] == job.attempts[1]["hosts"]


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_lost_node(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    """The job keeps its allocation: it is not queued again."""
    flags = (*SMALL, "--nodes=3", "--ntasks-per-node=2", "--no-kill")
    job = jobs.submit(flags=flags, NODES="2")
    job.wait_for_step(25)
    cluster.ask("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)
    assert [a["hosts"] for a in job.attempts] == [["node1", "node2"], ["node1", "node3"]], job.log
    assert job.facts["Restarts"] == "0" and "node2 is not fit" in job.log


@pytest.mark.slow
def test_the_time_is_over(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    """Slurm sends its notice up to a minute early. One rank is held until then, or the run would finish before."""
    limit = ("--time=2", "--signal=B:USR1@70")
    job = jobs.submit("health.lost_after=300", "health.stall_after=300", flags=(*TWO_BY_TWO, *limit))
    job.wait("the notice or steps", lambda: "asked to save" in job.log or 15 in job.steps)
    held = ranks_on("node2", cluster)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        job.wait("the notice", lambda: "asked to save" in job.log)
    finally:
        for pid in held:
            os.kill(pid, signal.SIGCONT)
    job.check_completed(attempts=2)
    check_same(job.run, undisturbed)


@pytest.mark.slow
def test_other_numbers_of_nodes(jobs: Jobs, cluster: Cluster, undisturbed: Path) -> None:
    """A job on 4 nodes, one on 2, and one on 4 again, the first two stopped for good: same samples, same loss."""
    for attempt, (nodes, until) in enumerate(((4, 15), (2, 35)), start=1):
        job = jobs.submit(flags=(*SMALL, f"--nodes={nodes}", "--ntasks-per-node=1"))
        job.wait_for_step(until, attempt)
        cluster.ask("scontrol", "update", f"JobId={job.number}", "Requeue=0")
        job.notice()
        assert job.end() == ("FAILED", "75"), job.log
        assert "may not be queued again" in job.log
    job = jobs.submit(flags=(*SMALL, "--nodes=4", "--ntasks-per-node=1"))
    assert job.end() == ("COMPLETED", "0"), job.log
    assert [len(a["hosts"]) for a in job.attempts] == [a["processes"] for a in job.attempts] == [4, 2, 4]
    assert job.steps == list(range(1, STEPS + 1))
    check_alike(job.run, undisturbed)


@pytest.mark.slow
def test_a_job_that_saves_nothing_new_is_not_repeated(jobs: Jobs) -> None:
    """The loss is not finite, each time at the same step."""
    one = (*SMALL, "--nodes=1", "--ntasks-per-node=1")
    job = jobs.submit("optim.muon_lr=1e30", "optim.adamw_lr=1e30", flags=one, MAX_ATTEMPTS="1")
    assert job.end() == ("FAILED", "1"), job.log
    assert len(job.attempts) == 2, "the first has saved the start"
    assert "attempts in a row have begun at step-00000000 and saved nothing new; not queued again" in job.log
