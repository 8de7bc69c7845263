"""Runs of two processes with a temporary fault: they name the fault, and end as the undisturbed run does."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config import Config
from sleeptrain.data.shards import write_shards
from sleeptrain.data.storage import DEFAULT_RETRIES
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.health import speed
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from tests.checkpoint.contents import contents
from tests.checkpoint.test_runs import at_step
from tests.data.texts import make_texts
from tests.parallel.layouts import Layout
from tests.parallel.test_matrix import Sleep, configuration, leaves, text
from tests.torture.attempts import Attempt, adopting_orphans

__all__ = ["text"]  # makes the fixture known here

STEPS = 12  # ten of them write more records than fit into the page that a full disk leaves in the file
STAGES, REPLICAS = Layout(1, 2, 1, 1), Layout(1, 1, 2, 1)


def config_of(text: Path, folder: Path, layout: Layout, *more: str) -> Config:
    every = (f"train.tokens={STEPS * 96}", "train.threads=1", "train.eval_every=1", "checkpoint.every=1")
    return configuration(text, folder, layout, Sleep(2, "features", "hard", True), 1, (*every, *more))


def run(
    text: Path, folder: Path, layout: Layout, fault: Callable[[], object] = lambda: None, *more: str
) -> tuple[int, str]:
    """(the exit code, the output)."""
    with adopting_orphans():
        attempt = Attempt(folder, config_of(text, folder, layout, *more), 2, fault=fault)
        return attempt.end(), attempt.log


def each(actions: dict[int, Callable[[Run], object]]) -> Callable[[], None]:
    """A fault: all processes take these actions after so many steps."""
    return lambda: at_step(pytest.MonkeyPatch(), actions)


def newest(folder: Path) -> dict[str, Any]:
    return contents(checkpoints(folder / "r" / "checkpoints")[-1])


def assert_same_end(folder: Path, straight: Path) -> None:
    found, wanted = newest(folder), newest(straight)
    assert found["step"] == wanted["step"] == STEPS
    for part in ("model", "optim", "carried"):
        a, b = dict(leaves(found[part])), dict(leaves(wanted[part]))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    records = read_metrics(folder / "r" / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "eval" in r] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """The folder of a layout's undisturbed run, which is made at its first use."""

    @lru_cache
    def made(layout: Layout) -> Path:
        folder = tmp_path_factory.mktemp("straight")
        assert run(text, folder, layout)[0] == 0
        return folder

    return made


@pytest.fixture
def small_shards(text: Path, tmp_path: Path) -> Path:
    """Shards of a few documents, so that a run opens one after the other."""
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    shutil.rmtree(folder / "train")
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    write_shards(folder / "train", make_texts(100), tokenizer, name="train", shard_bytes=8_000)
    return folder


@pytest.mark.slow
def test_shards_that_are_gone_are_named_and_the_run_goes_on_once_they_are_back(
    small_shards: Path, tmp_path: Path
) -> None:
    text, shards, away = small_shards, small_shards / "train", tmp_path / "away"
    assert len(list(shards.glob("*.tar"))) > 10
    assert run(text, tmp_path / "straight", STAGES)[0] == 0

    def take_away(made: Run) -> None:
        DEFAULT_RETRIES.__dict__["first_wait"] = 0.0
        if made.world.is_main:
            away.mkdir()
            for path in shards.glob("*.tar"):
                path.rename(away / path.name)

    code, log = run(text, tmp_path / "struck", STAGES, each({3: take_away}))
    last = log.splitlines()[-2]
    assert code == 2 and "Traceback" not in log, log
    assert str(shards) in last and ".tar: document " in last and "No such file" in last, log
    assert 3 <= newest(tmp_path / "struck")["step"] < STEPS, "what was trained before is saved"
    for path in away.iterdir():
        path.rename(shards / path.name)
    assert run(text, tmp_path / "struck", STAGES)[0] == 0
    assert_same_end(tmp_path / "struck", tmp_path / "straight")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(place: Path, made: Run) -> None:
    """Fill the file system of a file after the current save is done."""
    made.saver.wait()
    if made.world.is_main:
        with open(place, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_record(
    text: Path, tmp_path: Path, straight: Callable[[Layout], Path], small_disk: Path
) -> None:
    ballast = small_disk / "ballast"

    def free(made: Run) -> None:
        made.saver.wait()
        if made.world.is_main:
            ballast.unlink()

    code, log = run(text, small_disk / "runs", STAGES, each({1: partial(fill, ballast), STEPS - 1: free}))
    assert code == 0, log
    assert "metrics.jsonl takes no records (No space left on device); they are kept and retried" in log
    assert "ALARM: the checkpoint of step 1 was not written" in log and "the newest on disk is that of step 0" in log
    assert "No space left on device" in log and "Traceback" not in log
    assert_same_end(small_disk / "runs", straight(STAGES))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_and_the_next_start_goes_on(
    text: Path, tmp_path: Path, straight: Callable[[Layout], Path], small_disk: Path
) -> None:
    ballast = small_disk / "ballast"

    code, log = run(text, small_disk / "runs", STAGES, each({3: partial(fill, ballast)}))
    assert code == 1 and "the last checkpoint was not written" in log and "goes on from step 2" in log, log
    assert newest(small_disk / "runs")["step"] == 2
    ballast.unlink()
    assert run(text, small_disk / "runs", STAGES)[0] == 0
    assert_same_end(small_disk / "runs", straight(STAGES))


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_ends_all_before_it_is_used(
    text: Path, tmp_path: Path, straight: Callable[[Layout], Path]
) -> None:
    def breaks(made: Run) -> None:
        if made.world.rank == 1:
            weight = made.model.get_parameter("blocks.1.mlp.down_proj.weight")
            weight.register_hook(lambda gradient: gradient * torch.nan)

    code, log = run(text, tmp_path / "struck", REPLICAS, each({2: breaks}))
    assert code == 1 and "step 3: loss " in log and "gradient norm" in log and "on rank 1" in log, log
    assert newest(tmp_path / "struck")["step"] == 2
    assert all(bool(w.isfinite().all()) for _, w in leaves(newest(tmp_path / "struck")["model"]))
    assert run(text, tmp_path / "struck", REPLICAS)[0] == 0
    assert_same_end(tmp_path / "struck", straight(REPLICAS))


def slow(made: Run) -> None:
    """From now on process 1 sleeps for nine hundredths of a second after each hundredth that it has computed.

    Each process counts calls of the clock in place of seconds, so that a busy machine does not matter.
    """
    looks = itertools.count(step=10 if made.world.rank == 1 else 1)
    speed.__dict__["time"] = SimpleNamespace(perf_counter=lambda: float(next(looks)))
    if made.world.rank == 1:
        signal.signal(signal.SIGVTALRM, lambda *_: time.sleep(0.09))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.01, 0.01)


@pytest.mark.slow
def test_a_rank_ten_times_slower_is_named_and_changes_nothing(
    text: Path, tmp_path: Path, straight: Callable[[Layout], Path]
) -> None:
    more = ("health.probe_every=2", "health.slow_factor=3")
    code, log = run(text, tmp_path / "struck", REPLICAS, each({STEPS - 4: slow}), *more)
    assert code == 0, log
    assert f"step {STEPS}: rank 1 on " in log and " is slow: " in log, log
    found = [r["speed"]["slow"] for r in read_metrics(tmp_path / "struck" / "r" / "metrics.jsonl") if "speed" in r]
    assert len(found) == STEPS // 2 and "rank1" in found[-1] and "rank1" in found[-2]
    assert_same_end(tmp_path / "struck", straight(REPLICAS))
