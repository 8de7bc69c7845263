from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.processes import PATIENCE, RankError, naming, run_cases, run_ranks


def _sum(offset: int) -> torch.Tensor:
    x = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(x)
    return x


def test_ranks_speak_to_each_other_and_return_tensors_by_rank():
    assert [float(x) for x in run_ranks(_sum, 3, 10)] == [33.0] * 3


def test_ranks_that_start_once_return_the_results_of_each_case_by_rank():
    found = run_cases(_sum, 2, {"ten": 10, "twenty": 20})
    assert {name: [float(x) for x in ranks] for name, ranks in found.items()} == {
        "ten": [21.0] * 2,
        "twenty": [41.0] * 2,
    }


def test_an_error_names_its_case():
    def fails(divisor: int) -> float:
        return 1 / divisor

    with pytest.raises(RankError, match=r"rank 0 raised(?s:.)*ZeroDivisionError(?s:.)*in the case 'nothing'"):
        run_cases(fails, 1, {"one": 1, "nothing": 0})
    with pytest.raises(AssertionError) as caught, naming("nothing"):
        raise AssertionError("unequal")
    assert caught.value.__notes__ == ["in the case 'nothing'"]


@pytest.mark.timeout(int(PATIENCE))
def test_an_error_of_one_rank_comes_back_with_its_traceback_while_the_others_wait():
    def one_fails() -> None:
        if dist.get_rank() == 1:
            raise ValueError("rank one fell over")
        time.sleep(2 * PATIENCE)  # unless it is ended with the failed rank

    with pytest.raises(RankError, match=r"rank 1 raised(?s:.)*one_fails(?s:.)*rank one fell over"):
        run_ranks(one_fails, 2)


def test_a_rank_that_hangs_is_ended_with_all_that_it_started_and_says_where_it_was(tmp_path):
    def hang() -> None:
        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / str(dist.get_rank())).write_text(str(child.pid))
        time.sleep(1000)

    with pytest.raises(RankError, match=r"rank 0 did not finish in 10 s(?s:.)*in hang"):
        run_ranks(hang, 2, timeout=10)  # the processes exist by then, however busy the machine is
    for rank in range(2):
        assert _ended(int((tmp_path / str(rank)).read_text()))


def test_a_rank_that_is_killed_is_reported():
    with pytest.raises(RankError, match="rank 1 did not finish"):
        run_ranks(lambda: os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() else None, 2)


def _ended(pid: int) -> bool:
    """Gone, or a zombie that nobody waits for (a container without an init process)."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
