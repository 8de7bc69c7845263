"""A run with real processes, one of which is gone, stuck or has failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.train.status import read_status
from sleeptrain.watch.progress import Location, Phase
from tests.parallel.processes import PATIENCE
from tests.parallel.test_train import settings
from tests.watch.faults import Fault
from tests.watch.ranks import Ranks, started

HASTE = ("health.lost_after=10",)
STEPS = 5


pytestmark = pytest.mark.usefixtures("imported")


def config_of(folder: Path, *more: str) -> Config:
    """Two windows (6 cells and the answer); the first has two passes."""
    tokens = f"train.tokens={STEPS * 8 * 7}"
    return compose(settings(folder, "train.micro_batch=4", *HASTE, tokens, "parallel.pipeline=2", *more))


def stacks(folder: Path, step: int, rank: int) -> str:
    return (folder / "r" / "stacks" / f"step-{step:08d}-rank-{rank}.txt").read_text()


def all_logs(ranks: Ranks) -> str:
    return "".join(ranks.log(rank) for rank in range(len(ranks.workers)))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_run_which_names_its_place(tmp_path: Path, rank: int, what: str) -> None:
    fault = Fault(rank, Location(3, Phase.BACKWARD, 1, 2), what, str(tmp_path))
    with started(tmp_path, config_of(tmp_path), 2, fault) as ranks:
        (code,) = ranks.wait([1 - rank], timeout=PATIENCE)
        log = ranks.log(1 - rank)
        assert code == 1, log
    place = "at step 3, window 1, pass 2, backward"
    if rank:
        assert re.search(rf"sleeptrain: rank 1 was lost {place} \(last heard of \d+ s ago\)\n", log), log
    else:  # rank 0 also holds the store
        assert re.search(rf"sleeptrain: rank 0 (was lost {place}|or the launcher was lost.*last known {place})", log)
    assert log.count("sleeptrain: rank 0") + log.count("sleeptrain: rank 1") == 2, "one cause, one own place"
    assert f"sleeptrain: rank {1 - rank} ends at step 3, " in log and "Traceback" not in log
    assert "in try_step" in stacks(tmp_path, 3, 1 - rank) and place in stacks(tmp_path, 3, 1 - rank)
    assert checkpoints(tmp_path / "r" / "checkpoints"), "the run can go on"
    status = read_status(tmp_path / "r")
    assert status is not None
    if rank:
        assert (status["state"], status["exit_code"]) == ("failed", 1) and "rank 1 was lost" in status["reason"]
    else:
        assert status["state"] == "running", "nobody was left to say otherwise"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_mistake_on_one_rank_ends_all_with_its_message(tmp_path: Path, rank: int) -> None:
    fault = Fault(rank, Location(2, Phase.FORWARD, 2, 1), "raise", str(tmp_path))
    with started(tmp_path, config_of(tmp_path, "health.lost_after=30"), 2, fault) as ranks:
        assert ranks.wait([0, 1], timeout=PATIENCE) == [1, 1], all_logs(ranks)
        log, other = ranks.log(rank), ranks.log(1 - rank)
        assert log.count("Traceback") == 1 and "ValueError: a mistake of this rank alone" in log
        assert f"sleeptrain: rank {1 - rank} ends at step 2, " in other
        assert "Traceback" not in other and "lost" not in other
    status = read_status(tmp_path / "r")
    assert status is not None and (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].endswith("ValueError: a mistake of this rank alone")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_stands_still_ends_the_run_with_all_stacks(tmp_path: Path, rank: int) -> None:
    fault = Fault(rank, Location(3, Phase.FORWARD, 1, 2), "loop", str(tmp_path), stall=3)
    with started(tmp_path, config_of(tmp_path), 2, fault) as ranks:
        assert ranks.wait([0, 1], timeout=PATIENCE) == [1, 1], all_logs(ranks)
        (cause,) = re.findall(r"sleeptrain: (no progress for \d+ s: .*)", all_logs(ranks))
        assert re.search(rf"ranks? (0-1|{rank}) at step 3, window 1, pass 2, forward", cause)
        assert re.search(rf"ranks? (0-1|{1 - rank}) at step 3, ", cause)
        for one in (0, 1):
            assert f"rank {one} ends at step 3, " in ranks.log(one) and "in try_step" in ranks.log(one)
            assert "in try_step" in stacks(tmp_path, 3, one)
        assert "in strike" in ranks.log(rank)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_phase_that_takes_long_is_no_standstill(tmp_path: Path, rank: int) -> None:
    """A save takes twice the time of a standstill, while the other rank waits for the next step."""
    fault = Fault(rank, Location(2, Phase.SAVING), "hold", str(tmp_path), seconds=6, stall=3)
    with started(tmp_path, config_of(tmp_path), 2, fault) as ranks:
        assert ranks.wait([0, 1], timeout=PATIENCE) == [0, 0], all_logs(ranks)
        assert "sleeptrain:" not in all_logs(ranks)
    assert checkpoints(tmp_path / "r" / "checkpoints")[-1].name == f"step-{STEPS:08d}"
    assert not (tmp_path / "r" / "stacks").exists()
