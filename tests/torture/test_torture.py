"""A run that is killed again and again, anywhere, also while it saves, ends as the undisturbed run does."""

from __future__ import annotations

import os
import random
import secrets
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints, read_state
from sleeptrain.config import Config
from sleeptrain.stop import EXIT_STOPPED
from sleeptrain.train.logging.metrics import read_metrics
from tests.checkpoint.contents import contents
from tests.parallel.layouts import Layout
from tests.parallel.test_matrix import TOLERANCE, Sleep, configuration, deviations, leaves, rows_at_once, text
from tests.torture.attempts import Attempt, adopting_orphans
from tests.torture.strikes import STRIKES, Plan, draw, strike

__all__ = ["text"]  # makes the fixture known here

pytest.importorskip("psutil")
SEED = "SLEEPTRAIN_TORTURE_SEED"
SLEEP = Sleep(passes=1, feedback="features", eviction="hard", tied=True)
STEPS, EVAL_EVERY = 10, 4
# N and the batch change while the run goes on; memory is carried from step to step.
SETTINGS = (
    "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet]",
    "sleep.core=[1,3]",
    "sleep.curriculum=[{tokens: 288, passes: 3}, {tokens: 576, batch: 8}, {tokens: 960, passes: 2, batch: 4}]",
    "train.tokens=1152",
    "train.threads=1",
    f"train.eval_every={EVAL_EVERY}",
    "wandb.mode=offline",
    "health.lost_after=120",
)
SPEEDS = ("time", "tokens_per_second", "passes_per_second", "mfu", "memory_mb", "eta_seconds", "failed_saves")


class Story(NamedTuple):
    """layouts: each attempt draws one of them; the undisturbed run has the first."""

    name: str
    layouts: tuple[Layout, ...]

    @property
    def exact(self) -> bool:
        return len(self.layouts) == 1


STAGES_OF_TENSOR_RANKS = Story("2x2-tensor", (Layout(2, 2, 1, 1),))
STAGES_OF_REPLICAS = Story("2x2-replicas", (Layout(1, 2, 2, 1),))
CHANGING = Story(
    "changing",
    (
        Layout(1, 1, 1, 1),
        Layout(2, 2, 1, 1),
        Layout(1, 2, 2, 1),
        Layout(1, 2, 1, 1),
        Layout(2, 1, 1, 1),
        Layout(1, 1, 2, 2),
    ),
)


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a layout's undisturbed run, which is made at its first use."""
    pytest.importorskip("wandb")

    @lru_cache
    def run(layout: Layout) -> Path:
        folder = tmp_path_factory.mktemp("straight")
        with adopting_orphans():
            finish(text, folder, layout)
        return folder

    return run


def config_of(text: Path, folder: Path, layout: Layout, *more: str) -> Config:
    return configuration(text, folder, layout, SLEEP, rows_at_once(layout), (*SETTINGS, "checkpoint.every=1", *more))


def start(text: Path, folder: Path, layout: Layout, plan: Plan | None = None, *more: str) -> Attempt:
    return Attempt(folder, config_of(text, folder, layout, *more), layout.size, plan and plan.hold)


def finish(text: Path, folder: Path, layout: Layout) -> None:
    attempt = start(text, folder, layout)
    assert attempt.end() == 0, attempt.log
    assert "ALARM" not in attempt.log


class Tortured:
    """A run in its own folder that is struck until it is done, and the facts about it so far."""

    def __init__(self, text: Path, folder: Path, story: Story, rng: random.Random) -> None:
        self._text, self.folder, self._story, self._rng = text, folder, story, rng
        self.place = folder / "r"
        self._step = -1
        self._steps: list[int] = []
        self._ids: set[str] = set()

    @property
    def done(self) -> bool:
        return self._step == STEPS

    def attempt(self, kind: str) -> str | None:
        """One start and, unless the run ends before, one strike; returns what the strike hit."""
        begun, recorded = max(self._step, 0), len(self._steps)
        layout = self._rng.choice(self._story.layouts)
        plan = draw(self._rng, kind, layout.size)
        free = (f"checkpoint.every={self._rng.choice([1, 2])}", f"checkpoint.keep={self._rng.choice([1, 2])}")
        attempt = start(self._text, self.folder, layout, plan, *free)
        hit = strike(attempt, plan)
        label = f"{layout}, {plan}, hit: {hit}"
        code = attempt.end()
        assert code == 0 if hit is None else code != 2, f"{label}: exit code {code}\n{attempt.log}"
        self._check(f"{label}: exit code {code}\n{attempt.log}", stopped=code in (0, EXIT_STOPPED))
        if (step := attempt.signs.stop_step) is not None:  # that step ends, and the next one if already agreed on
            most = max((step or begun) + 1, recorded)
            assert len(trained_steps(self.place)) <= most, f"{label}: it did not stop\n{attempt.log}"
        return hit

    def _check(self, log: str, stopped: bool) -> None:
        saved = checkpoints(self.place / "checkpoints")
        step = read_state(saved[-1])["step"] if saved else -1
        assert step >= self._step, f"a checkpoint is lost\n{log}"
        ids = {path.name.rpartition("-")[2] for path in self.place.glob("wandb/offline-run-*")}
        if self._step >= 0:
            assert ids == self._ids, f"another wandb run\n{log}"
        steps = trained_steps(self.place)
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= step, f"{steps}\n{log}"
        # If a start was stopped before it read the checkpoint, the records of a killed start still exist.
        if stopped and steps != self._steps:
            assert len(steps) == max(step, 0), f"what was trained is not saved\n{log}"
        self._step, self._steps, self._ids = step, steps, ids

    def finish(self) -> None:
        layout = self._rng.choice(self._story.layouts)
        finish(self._text, self.folder, layout)
        self._check("the last start", stopped=True)
        assert self.done


def trained_steps(place: Path) -> list[int]:
    """The steps in the records of the run."""
    if not (place / "metrics.jsonl").exists():
        return []
    return [record["step"] for record in read_metrics(place / "metrics.jsonl") if "loss" in record]


def results(place: Path) -> list[dict[str, Any]]:
    records = [r for r in read_metrics(place / "metrics.jsonl") if "attempt" not in r]
    return [{k: v for k, v in r.items() if k not in SPEEDS} for r in records]


def check_end(folder: Path, straight: Path, exact: bool) -> None:
    """Check that the run in `folder` ended as the undisturbed one did."""
    place, other = folder / "r", straight / "r"
    found, wanted = (contents(checkpoints(p / "checkpoints")[-1]) for p in (place, other))
    assert (found["step"], found["tokens"], found["samples"]) == (wanted["step"], wanted["tokens"], wanted["samples"])
    assert found["step"] == STEPS and wanted["carried"], "the case needs memory that goes on"
    parts = ("model", "optim", "carried")
    a, b = ({p + path: t for p in parts for path, t in leaves(saved[p])} for saved in (found, wanted))
    if exact:
        assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]
        assert results(place) == results(other)
    else:
        apart = deviations(a, b)
        assert not {name: x for name, x in apart.items() if name.startswith("model") and not x <= TOLERANCE}
        assert [(r["step"], r.keys()) for r in results(place)] == [(r["step"], r.keys()) for r in results(other)]
        losses = [[r["loss"] for r in results(p) if "loss" in r] for p in (place, other)]
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    files = [*place.iterdir(), *(place / "checkpoints").iterdir()]
    remains = [path.name for path in files if path.name.startswith((".", "damaged"))]
    assert not remains, "what killed saves have left is removed, and a kill damages nothing"
    check_wandb(place)


def check_wandb(place: Path) -> None:
    """The newest files of wandb have the identity that the checkpoint keeps."""
    (wanted,) = {read_state(path)["wandb_id"] for path in checkpoints(place / "checkpoints")}
    newest = max(place.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name.endswith(f"-{wanted}")


def torture(text: Path, folder: Path, story: Story, strikes: list[str], straight: Path) -> None:
    """Strike runs of a story until all strikes have hit, and print what they hit."""
    seed = int(os.environ.get(SEED, secrets.randbelow(10**6)))
    print(f"{story.name}: {SEED}={seed}")
    rng, tally = random.Random(f"{seed} {story.name}"), Counter[tuple[str, str]]()
    rng.shuffle(strikes)
    runs: list[Tortured] = []
    with adopting_orphans():
        while strikes:
            if not runs or runs[-1].done:
                runs.append(Tortured(text, folder / f"run{len(runs)}", story, rng))
            if hit := runs[-1].attempt(strikes[-1]):
                tally[strikes.pop(), hit] += 1
        runs[-1].finish()
    for run in runs:
        check_end(run.folder, straight, story.exact)
    print(f"{story.name}: {len(runs)} runs, {tally.total()} strikes")
    for (kind, hit), count in sorted(tally.items()):
        print(f"  {count} x {kind}: {hit}")


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_the_undisturbed_one(text: Path, tmp_path: Path, straight: Any) -> None:
    layout = STAGES_OF_TENSOR_RANKS.layouts[0]
    torture(text, tmp_path, STAGES_OF_TENSOR_RANKS, ["kill one rank", "SIGTERM"], straight(layout))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("story", [STAGES_OF_TENSOR_RANKS, STAGES_OF_REPLICAS, CHANGING], ids=lambda s: s.name)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(
    text: Path, tmp_path: Path, straight: Any, story: Story
) -> None:
    """There are 60 strikes in total."""
    torture(text, tmp_path, story, list(STRIKES) * 4, straight(story.layouts[0]))
