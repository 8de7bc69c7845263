"""Runs that are stopped, at every place: their work is kept, and they go on as undisturbed runs do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain import stop
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.data.assemble import Assembler
from sleeptrain.errors import ConfigError
from sleeptrain.stop import EXIT_STOPPED, SIGNALS, Stopped
from sleeptrain.train import stopping, trainer
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import read_status
from sleeptrain.watch.progress import Location, Phase, Progress
from tests.checkpoint.contents import contents
from tests.parallel.processes import PATIENCE
from tests.train.test_trainer import records, run, settings, start, weights

CURRICULUM = "sleep.curriculum=[{tokens: 280, passes: 3}, {tokens: 400, batch: 4}]"
LAST = 16  # steps; the last ones have fewer rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, CURRICULUM)
    return folder


def status(folder: Path) -> dict[str, Any]:
    found = read_status(folder / "r")
    assert found is not None
    return found


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "r" / "metrics.jsonl") if "attempt" in r]


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return records(a) == records(b) and all(torch.equal(one[name], other[name]) for name in one)


def signalled(patch: pytest.MonkeyPatch, place: Location, *numbers: signal.Signals) -> None:
    """Send the signals to this process when it is at the place for the first time."""
    move, sent = Progress._move, list[bool]()

    def moved(self: Progress, location: Location) -> None:
        move(self, location)
        if location == place and not sent:
            sent.append(True)
            for number in numbers:
                os.kill(os.getpid(), number)

    patch.setattr(Progress, "_move", moved)


def stopped(folder: Path, *more: str) -> int:
    """Train until a stop; return the step of the stop."""
    with pytest.raises(Stopped) as end:
        trainer.train(compose(settings(folder, *more)))
    assert end.value.code == EXIT_STOPPED == 75
    found = status(folder)
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    saved = contents(checkpoints(folder / "r" / "checkpoints")[-1])
    assert saved["step"] == found["step"] and saved["tokens"] == found["tokens"]
    return int(found["step"])


PLACES = {
    "first save": (Location(None, Phase.SAVING), 0),
    "reading for the first step": (Location(1, Phase.READING), 0),
    "first step": (Location(1, Phase.BACKWARD, 1, 1), 1),
    "update": (Location(7, Phase.UPDATE), 7),
    "evaluation": (Location(5, Phase.EVALUATION), 5),
    "a held-out batch": (Location(10, Phase.EVALUATION, 1, 2), 10),
    "save": (Location(6, Phase.SAVING), 7),  # the exchange of step 6 is over
    "last evaluation": (Location(LAST, Phase.EVALUATION), LAST),
}


@pytest.mark.parametrize(("place", "step"), PLACES.values(), ids=PLACES)
@pytest.mark.slow
def test_a_signal_anywhere_stops_a_run_that_goes_on_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, place: Location, step: int
) -> None:
    """One signal, or three. Law 5; a cancelled evaluation is made when the run goes on."""
    numbers = (signal.SIGTERM,) if step in (1, 5) else (signal.SIGINT, signal.SIGUSR1, signal.SIGINT)
    with monkeypatch.context() as patch:
        signalled(patch, place, *numbers)
        assert stopped(tmp_path, CURRICULUM) == step
    assert status(tmp_path)["reason"] == numbers[0].name
    held = [r["step"] for r in records(tmp_path) if "eval" in r]
    assert held == [s for s in (5, 10, 15, LAST) if s < step or (s == step and place.phase is not Phase.EVALUATION)]
    run(tmp_path, CURRICULUM)
    assert same(tmp_path, undisturbed)
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("finished", 0)


def test_the_process_gets_its_own_handlers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    signalled(monkeypatch, Location(2, Phase.READING), signal.SIGTERM)
    stopped(tmp_path)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_owed_evaluation_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path) -> None:
    """The evaluation is cancelled twice, then made, and the run is stopped before its next step."""
    for _ in range(2):
        with monkeypatch.context() as patch:
            signalled(patch, Location(5, Phase.EVALUATION), signal.SIGTERM)
            signalled(patch, Location(None, Phase.EVALUATION), signal.SIGTERM)
            assert stopped(tmp_path, CURRICULUM) == 5
    log = Run.log

    def logged(self: Run, record: dict[str, Any]) -> None:
        log(self, record)
        if "eval" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logged)
        assert stopped(tmp_path, CURRICULUM) == 5
    run(tmp_path, CURRICULUM)
    assert same(tmp_path, undisturbed)
    assert [(a["attempt"]["number"], a["step"]) for a in attempts(tmp_path)] == [(1, 0), (2, 5), (3, 5), (4, 5)]
    assert attempts(tmp_path)[-1]["attempt"] == status(tmp_path)["attempt"]


def test_a_run_at_its_end_is_finished_whatever_signal_it_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, Location(12, Phase.SAVING), signal.SIGTERM)
    run(tmp_path)
    assert status(tmp_path)["state"] == "finished"


def test_a_run_that_waits_for_data_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_shards: tuple[str, ...]
) -> None:
    run(tmp_path / "whole", *tiny_shards)
    make, release = Assembler.batch, threading.Event()

    def blocked(self: Assembler, assignment: Any, rows: Any, step: int) -> Any:
        if step == 4:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            release.wait(PATIENCE)
        return make(self, assignment, rows, step)

    with monkeypatch.context() as patch:
        patch.setattr(Assembler, "batch", blocked)
        assert stopped(tmp_path / "waiting", *tiny_shards) in range(3, 5)
        assert not release.is_set()
        release.set()
    run(tmp_path / "waiting", *tiny_shards)
    assert same(tmp_path / "waiting", tmp_path / "whole")


class Clock:
    """A clock that stands still until it is set."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


def test_the_time_limit_is_kept_with_room_for_a_step_and_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps take a second, and saves two: of 20 seconds, 1.5 * (1 + 2) + 5 are kept free.

    Step 12 finds in its exchange that more than 10.5 seconds are over, and is the last one.
    """
    clock, advance = Clock(), Run.advance
    monkeypatch.setattr(stopping, "time", clock)
    monkeypatch.setattr(stop, "time", clock)

    def advanced(run: Run, *step: Any) -> None:
        advance(run, *step)
        run.stopping.save_needs = 2.0
        clock.now += 1

    monkeypatch.setattr(Run, "advance", advanced)
    assert stopped(tmp_path, "train.max_time=20s", f"train.tokens={10_000 * 56}") == 12
    stderr = capsys.readouterr().err
    kept = "time limit (10 s kept free: the longest step so far took 1.0 s, the last save may take 2.0 s)"
    assert "time limit in 0:00:20" in stderr and f"{kept}: saved at step 12" in stderr
    clock.now += 10**6
    run(tmp_path / "free", "train.max_time=null")


def test_a_clock_that_is_set_while_a_run_goes_on_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, date = Run.advance, time.time

    def advanced(run: Run, *step: Any) -> None:
        advance(run, *step)
        if run.step == 3:
            monkeypatch.setattr(time, "time", lambda: date() + 10 * 3600)

    monkeypatch.setattr(Run, "advance", advanced)
    run(tmp_path, "train.max_time=9h")
    assert status(tmp_path)["state"] == "finished"
    times = [r["time"] for r in read_metrics(tmp_path / "r" / "metrics.jsonl")]
    assert times == sorted(times) and times[-1] - times[0] < 9 * 3600


def test_the_end_of_the_slurm_job_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert stopped_early(tmp_path)
    assert re.match(
        r"sleeptrain: time limit \(5 s kept free.*: stopped before the run was opened", capsys.readouterr().err
    )
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME=soon"):
        run(tmp_path)
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["exit_code"] == 2
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    run(tmp_path)
    assert [(a["attempt"]["number"], a["attempt"]["job"]) for a in attempts(tmp_path)] == [(1, "77")]


def stopped_early(folder: Path) -> bool:
    """Whether the run stopped before it wrote any file but its status."""
    with pytest.raises(Stopped):
        trainer.train(compose(settings(folder)))
    return [path.name for path in (folder / "r").iterdir()] == ["status.json"] and status(folder)["state"] == "stopped"


def test_a_failure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a mistake  in the code")

    with monkeypatch.context() as patch, pytest.raises(ValueError):
        patch.setattr(trainer, "try_step", broken)
        run(tmp_path)
    found = status(tmp_path)
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 1, 0)
    assert found["reason"] == "ValueError: a mistake in the code"
    with pytest.raises(ConfigError):
        run(tmp_path, "optim.muon_lr=0.5")
    found = status(tmp_path)
    assert (found["exit_code"], found["attempt"]["number"]) == (2, 1), "a start that is refused is no attempt"
    assert "optim.muon_lr: 0.002 -> 0.5" in found["reason"]


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        run(tmp_path, "model.vocab_size=1")
    assert list(tmp_path.iterdir()) == []


def test_allowed_changes_are_made_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    longer = f"train.tokens={14 * 56}"
    with pytest.raises(ConfigError, match=r"add 'run.allow_changes=\[optim.muon_lr,train.tokens\]'") as refused:
        run(tmp_path, longer, "optim.muon_lr=0.5", "train.log_every=2")
    assert refused.value.details == ("optim.muon_lr: 0.002 -> 0.5", f"train.tokens: {12 * 56} -> {14 * 56}")
    with pytest.raises(ConfigError, match="other settings") as refused:
        run(tmp_path, longer, "optim.muon_lr=0.5", "run.allow_changes=[train.tokens]")
    assert refused.value.details == ("optim.muon_lr: 0.002 -> 0.5",)
    config = run(tmp_path, longer, "optim.muon_lr=0.5", "run.allow_changes=[train.tokens,optim.muon_lr]")
    assert config.optim.muon_lr == 0.5 and status(tmp_path)["step"] == 14
    line = '{"attempt": 2, "step": 12, "changes": ["optim.muon_lr: 0.002 -> 0.5", "train.tokens: 672 -> 784"]}\n'
    assert (tmp_path / "r" / "changes.jsonl").read_text() == line
    assert "changed since the attempt before:\n  optim.muon_lr: 0.002 -> 0.5\n" in capsys.readouterr().err
    run(tmp_path, longer, "optim.muon_lr=0.5")  # the changed settings belong to the run now
    assert (tmp_path / "r" / "changes.jsonl").read_text() == line


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)


HOLD = """
import pathlib, sys, time

class Hold:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            pathlib.Path({folder!r}, "loading").touch()
            while not pathlib.Path({folder!r}, "go").exists():
                time.sleep(0.01)

sys.meta_path.insert(0, Hold())
"""


@pytest.mark.slow
def test_signals_while_the_command_is_loading_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads `sitecustomize` first, and halts just before it loads torch."""
    (tmp_path / "sitecustomize.py").write_text(HOLD.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process, lines = start(tmp_path, stderr=subprocess.PIPE), list[str]()
    assert process.stderr is not None
    try:
        until((tmp_path / "loading").exists, process)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # each after the one before is handled
            process.send_signal(number)
            lines.append(process.stderr.readline())
        (tmp_path / "go").touch()
        _, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, stderr
    assert lines[0] == "sleeptrain: SIGUSR1: stops after the step in progress, with everything saved\n"
    assert all("is stopping already since SIGUSR1" in line for line in lines[1:]), lines
    assert stderr == "sleeptrain: SIGUSR1: stopped before the run was opened; the same command starts it again\n"
    assert (status(tmp_path)["state"], status(tmp_path)["attempt"]) == ("stopped", None)
