"""What earlier attempts have left of a run: what its records need of its checkpoints, and what is kept of them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.checkpoint.find import Found, NoneWhole, newest_whole
from sleeptrain.checkpoint.folder import CONFIG, LATEST, checkpoints, point_to, set_aside, step_folder, step_of
from sleeptrain.config import load_resolved
from sleeptrain.config.changes import check_same_run
from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.files import beside, sync
from sleeptrain.train import changes
from sleeptrain.train.logging.metrics import METRICS, MetricsStream
from sleeptrain.train.status import FILE as STATUS
from sleeptrain.train.status import State, read_status

EARLIER = "earlier"
# What a run keeps in its folder. What is moved last shows, until then, that there is something to move.
OWN = (CONFIG, changes.FILE, "wandb", "stacks", "checkpoints", STATUS, METRICS)

# Of the largest step that a pointer may name.
DIGITS = 18


@dataclass(frozen=True)
class Start:
    """whole: the checkpoint that a run goes on from; None where it begins. damaged: newer ones, and what is wrong.

    over: whether it begins although it has come further.
    """

    whole: Path | None
    damaged: dict[Path, str]
    over: bool


def find_start(folder: Path, world: World, start_over: bool) -> Start:
    """All processes call it. Raises ConfigError where there is no checkpoint and records say that there was one,
    NoneWhole where all are damaged, unless the run is to start over then.
    """
    try:
        found, is_lost = newest_whole(folder / "checkpoints", world), False
    except NoneWhole:
        if not start_over:
            raise
        found, is_lost = Found(None, {}), True

    def check() -> bool:
        if found.whole is not None or not world.is_main:
            return False
        step = reached(folder)
        if step and not start_over:
            raise ConfigError(
                f"{folder} has records up to step {step}, and no checkpoint to go on from: bring back {folder}/"
                f"checkpoints, choose another run.name, or add run.start_over=true, which keeps in {folder}/{EARLIER} "
                "what is there"
            )
        return is_lost or step > 0

    return Start(found.whole, found.damaged, world.all_or_raise(check)[0])


def settings_of(folder: Path, checkpoint: Path, config: Config) -> Config:
    """The settings that the run had last, by its folder or, where that has lost them, by its checkpoint.

    Raises ConfigError where the checkpoint is that of another run.
    """
    saved = load_resolved(checkpoint / CONFIG)
    check_same_run(saved, config, str(checkpoint))
    path = folder / CONFIG
    return load_resolved(path) if path.exists() else saved


def keep(folder: Path, start: Start, step: int, attempt: int) -> list[str]:
    """Keeps what an attempt is about to pass over, which begins at `step`; says so in lines.

    What a run has left that starts over is moved, damaged checkpoints are set aside. Where newer checkpoints have been
    than that of `step`, the records are copied: more of them are dropped than a stop costs.
    """
    if start.over:
        return [f"starts over; what the run has left is kept in {_keep_all(folder)}"]
    if start.whole is None:
        return []
    lines, known, records = list[str](), _newest_known(folder), folder / METRICS
    if known > step and records.exists():
        copy = _copy(records, folder / f"metrics-before-attempt-{attempt}.jsonl")
        lines.append(f"the records until now are kept in {copy.name}: those of later steps than {step} are made anew")
    for path, damage in start.damaged.items():
        lines.append(f"{path.name} is damaged ({damage}); set aside as {set_aside(path).name}")
    if known > step:
        lines += [] if start.damaged else [f"the checkpoint of step {known} is gone"]
        lines.append(f"going on from the checkpoint of step {step}")
        point_to(step_folder(folder / "checkpoints", step))
    if step and not records.exists():
        lines.append(f"{records} is gone: there are no records of the first {step} steps")
    return lines


def reached(folder: Path) -> int:
    """The last step that records or status of the run in a folder tell of; 0 where they tell of none."""
    path, status = folder / METRICS, read_status(folder)
    records = MetricsStream(path) if path.exists() else ()
    return max([status["step"] if status else 0, *(record["step"] for record in records)])


def _keep_all(folder: Path) -> Path:
    """Moves all that a run has left into a folder of its own, which is returned."""
    numbers = [int(path.name) for path in (folder / EARLIER).glob("*") if path.name.isdecimal()]
    kept = folder / EARLIER / str(max(numbers, default=0) + 1)
    kept.mkdir(parents=True)
    for name in OWN:
        if (folder / name).exists():
            os.rename(folder / name, kept / name)
    sync(folder)
    return kept


def _newest_known(folder: Path) -> int:
    """The step of the newest checkpoint that the run is known to have had; 0 where none is known of."""
    steps, status = [0], read_status(folder)
    steps += [step_of(path) for path in checkpoints(folder / "checkpoints")]
    if status and status["state"] == State.FINISHED:
        steps.append(status["step"])
    latest = folder / "checkpoints" / LATEST
    name = latest.read_text(errors="replace").strip().removeprefix("step-") if latest.is_file() else ""
    return max([*steps, int(name) if name.isdecimal() and len(name) <= DIGITS else 0])


def _copy(path: Path, copy: Path) -> Path:
    """A whole copy; one that is there is left, since the attempt that made it was killed before it had a record."""
    if not copy.exists():
        partial = beside(copy, "partial")
        shutil.copyfile(path, partial)
        sync(partial)
        os.rename(partial, copy)
    return copy
