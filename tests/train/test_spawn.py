"""A run that starts its own workers: to its user they are one run, whatever happens to a worker."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.distributed.launch import find_place
from sleeptrain.errors import ConfigError
from sleeptrain.stop import EXIT_STOPPED
from sleeptrain.train import spawn
from sleeptrain.train.spawn import num_workers
from tests.checkpoint.contents import contents
from tests.parallel.processes import PATIENCE
from tests.parallel.test_train import records, settings

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")


@contextmanager
def killed_in_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    """After the block, kill the process and all that it started, if they have not ended."""
    try:
        yield
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            one.kill()
        process.kill()
        process.wait()


@contextmanager
def started(folder: Path, *more: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A run over two stages; no process of it survives the block."""
    arguments = [*settings(folder, "train.micro_batch=4", "checkpoint.every=0", *more), "parallel.pipeline=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sleeptrain", "train", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    with killed_in_the_end(process):
        yield process


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [c for c in children if any("spawn_main" in part for part in c.cmdline())]


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    path, deadline = folder / "r" / "metrics.jsonl", time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= 3:
            return
        time.sleep(0.05)
    raise AssertionError(f"no steps; exit code {process.poll()}")


def wait_for_workers(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if len(workers_of(process)) == 2:
            return
        time.sleep(0.05)
    raise AssertionError(f"no workers; exit code {process.poll()}")


LONG = f"train.tokens={100_000 * 56}"


def test_the_death_of_a_worker_ends_all(tmp_path: Path) -> None:
    with started(tmp_path, LONG) as process:
        wait_for_steps(tmp_path, process)
        workers = workers_of(process)
        assert len(workers) == 2
        workers[1].kill()
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        assert "2 processes are started on this machine" in stderr and "failed, and all have been ended" in stderr
        assert "sleeptrain: rank 1 was ended by SIGKILL at " in stderr and "Traceback" not in stderr
        assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("wait", [pytest.param(wait_for_steps, marks=pytest.mark.slow), wait_for_workers])
def test_workers_do_not_outlive_who_started_them(
    tmp_path: Path, wait: Callable[[Path, subprocess.Popen[str]], None]
) -> None:
    with started(tmp_path, LONG) as process:
        wait(tmp_path, process)
        workers = workers_of(process)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
        assert not [w for w in alive if w.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_that_begins_when_its_starter_is_gone_ends_at_once(tmp_path: Path) -> None:
    """Otherwise it would look for the store of the starter, which is gone too, until `health.timeout`."""
    config = compose([*settings(tmp_path), "parallel.pipeline=2"])
    forks = multiprocessing.get_context("fork")
    receiver, sender = forks.Pipe(duplex=False)

    def late(starter: int) -> None:
        sender.send(os.getpid())
        while os.getppid() == starter:
            time.sleep(0.01)
        spawn._work(config, 0, 2, 9, sender)

    def start_and_die() -> None:
        forks.Process(target=late, args=(os.getpid(),)).start()
        os._exit(0)

    starter = forks.Process(target=start_and_die)
    starter.start()
    sender.close()
    worker = receiver.recv()
    try:
        assert receiver.poll(PATIENCE), "it still lives"
        with pytest.raises(EOFError):
            receiver.recv()
    finally:
        starter.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


class Stopped(NamedTuple):
    """A run that got a signal. compiled: its calls of compilers. listened: its addresses during its steps."""

    folder: Path
    code: int
    stderr: str
    compiled: str
    listened: set[str]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    calls, tools = folder / "calls", folder / "tools"
    tools.mkdir()
    for name in ("cc", "gcc", "g++", "c++", "clang", "ld", "ninja", "nvcc"):
        (tools / name).write_text(f'#!/bin/sh\necho "$0 $*" >>{calls}\nexit 1\n')
        (tools / name).chmod(0o755)
    with started(folder, LONG, PATH=f"{tools}:{os.environ['PATH']}") as process:
        wait_for_steps(folder, process)
        sockets = [c for p in (psutil.Process(process.pid), *workers_of(process)) for c in p.net_connections("tcp")]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=PATIENCE)
    listened = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}
    return Stopped(folder, process.returncode, stderr, calls.read_text() if calls.exists() else "", listened)


@pytest.mark.slow
def test_a_signal_saves_in_all(stopped_run: Stopped) -> None:
    assert stopped_run.code == EXIT_STOPPED, stopped_run.stderr
    saved = contents(checkpoints(stopped_run.folder / "r" / "checkpoints")[-1])
    assert saved["step"] == records(stopped_run.folder)[-1]["step"] >= 2
    assert f"SIGTERM: saved at step {saved['step']}" in stopped_run.stderr


def test_a_start_compiles_nothing_and_says_nothing_of_other_packages(stopped_run: Stopped) -> None:
    own = re.compile(r"sleeptrain: |r: |step \d+\b|SIGTERM: |time limit |the first step's ")
    assert [line for line in stopped_run.stderr.splitlines() if not own.match(line)] == []
    assert stopped_run.compiled == ""


def test_nobody_else_reaches_the_sockets_of_the_processes(stopped_run: Stopped) -> None:
    assert stopped_run.listened == {"127.0.0.1"}


@pytest.mark.slow
def test_a_mistake_that_all_workers_find_is_reported_once(tmp_path: Path) -> None:
    missing = f"data.shards.sources=[{{train: {tmp_path / 'none'}, validation: {tmp_path / 'none'}}}]"
    with started(tmp_path, "data=stdlib", "data.shards.tokenizer=''", missing) as process:
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, stderr
    assert stderr.count(str(tmp_path / "none")) == 1 and "Traceback" not in stderr


def test_workers_are_started_where_no_launcher_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four = compose(settings(tmp_path, "parallel.tensor=2", "parallel.pipeline=2"))
    assert num_workers(four) == 4 and num_workers(compose(settings(tmp_path))) == 0
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        num_workers(four)
    monkeypatch.setenv("MASTER_ADDR", "host")
    assert num_workers(four) == 0


def test_places() -> None:
    assert find_place({}).size == 1
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    assert find_place(batch_script).size == 1
    meeting = {"MASTER_ADDR": "host", "MASTER_PORT": "1"}
    place = find_place(
        {**batch_script, **meeting, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    )
    assert (place.rank, place.size, place.local_rank) == (3, 4, 1)
