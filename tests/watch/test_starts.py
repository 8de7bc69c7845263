"""The watch under each way to start a run; `test_watch.py` has the tests that all of them share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sleeptrain.stop import EXIT_STOPPED
from sleeptrain.watch.progress import Location, Phase
from tests.parallel.processes import PATIENCE
from tests.parallel.test_train import settings
from tests.train.test_spawn import killed_in_the_end, wait_for_steps, workers_of
from tests.watch.faults import Fault

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HASTE = ("health.lost_after=10",)
PLACE = Location(3, Phase.BACKWARD, 1, 2)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")


@contextmanager
def job(folder: Path, fault: Fault, *launcher: str) -> Iterator[subprocess.Popen[str]]:
    """Two stages of two tensor ranks; no process of the run survives the block."""
    arguments = settings(folder, "train.micro_batch=4", *HASTE, "parallel.pipeline=2", "parallel.tensor=2")
    process = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "tests/watch/job.py"), "train", *arguments, f"train.tokens={10**6}"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
            "SLEEPTRAIN_TEST_FAULT": fault.encode(),
        },
    )
    with killed_in_the_end(process):
        yield process


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [c for c in children if any(w in part for part in c.cmdline() for w in ("spawn_main", "job.py"))]


@pytest.mark.parametrize(
    ("rank", "what", "cause", "code"),
    [
        (3, "kill", "rank 3 was ended by SIGKILL at step 3, window 1, pass 2, backward", 137),
        (0, "kill", "rank 0 was ended by SIGKILL at step 3, ", 137),
        (1, "stop", "rank 1 was lost at step 3, window 1, pass 2, backward", 1),
        (2, "raise", "rank 2 failed at step 3, window 1, pass 2, backward: V", 1),
    ],
)
def test_own_workers(tmp_path: Path, rank: int, what: str, cause: str, code: int) -> None:
    """The starting process holds the store: it prints the cause, and ends the processes that do not end."""
    with job(tmp_path, Fault(rank, PLACE, what, str(tmp_path))) as process:
        wait_for_steps(tmp_path, process)
        ranks = ranks_of(process)
        assert len(ranks) == 4
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, stderr
        assert f"sleeptrain: {cause}" in stderr.rstrip().splitlines()[-2], stderr
        assert stderr.rstrip().splitlines()[-1].startswith(f"sleeptrain: process {rank} of 4 failed"), stderr
        assert stderr.count("Traceback") == (1 if what == "raise" else 0), stderr
        assert not any(one.is_running() for one in ranks)


@pytest.mark.parametrize("rank", [0, 2])
def test_torchrun(tmp_path: Path, rank: int) -> None:
    """torchrun's agent holds the store, and asks the others to stop when one has died."""
    with job(tmp_path, Fault(rank, PLACE, "kill", str(tmp_path)), *TORCHRUN) as process:
        wait_for_steps(tmp_path, process)
        ranks = ranks_of(process)
        assert len(ranks) == 4
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        lost = re.findall(r"sleeptrain: rank (\d) was lost at (.*) \(last heard of \d+ s ago\)", stderr)
        assert set(lost) == {(str(rank), str(PLACE))}, stderr  # twice if the store answers slowly
        ends = re.findall(r"sleeptrain: rank (\d) ends at step 3, ", stderr)
        assert sorted(ends) == [str(r) for r in range(4) if r != rank], stderr
        assert not any(one.is_running() for one in ranks)


def test_a_run_that_is_suspended_at_the_terminal_goes_on(tmp_path: Path) -> None:
    """The pause is longer than any rank may be silent."""
    with job(tmp_path, Fault(0, Location(-1, Phase.SAVING), "hold", str(tmp_path))) as process:
        wait_for_steps(tmp_path, process)
        process.send_signal(signal.SIGTSTP)
        time.sleep(15)
        assert all(one.status() == psutil.STATUS_STOPPED for one in workers_of(process))
        process.send_signal(signal.SIGCONT)
        time.sleep(4)
        process.terminate()
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_STOPPED and "SIGTERM: saved at step" in stderr, stderr
