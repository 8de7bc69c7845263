"""Files of earlier attempts of a run: the checkpoint that it goes on from, and the files that are moved or copied."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.checkpoint.find import Found, NoneWhole, newest_whole
from sleeptrain.checkpoint.folder import (
    CHECKPOINTS,
    CONFIG,
    LATEST,
    checkpoints,
    point_to,
    set_aside,
    step_folder,
    step_of,
)
from sleeptrain.config import load_resolved
from sleeptrain.config.changes import check_same_run
from sleeptrain.config.schema import Config
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.files import beside, sync
from sleeptrain.remote import Location
from sleeptrain.train import changes
from sleeptrain.train.logging.metrics import METRICS, MetricsStream
from sleeptrain.train.status import FILE as STATUS
from sleeptrain.train.status import State, read_status

EARLIER = "earlier"
# The files of a run in its folder. The metrics file is moved last: until then it shows that there are files to move.
RUN_FILES = (CONFIG, changes.FILE, "wandb", "stacks", CHECKPOINTS, STATUS, METRICS)

# The most digits of a step number in the file `latest`.
DIGITS = 18


@dataclass(frozen=True)
class Start:
    """Where an attempt starts.

    whole: the checkpoint that the run goes on from; None if it begins anew.
    damaged: damaged newer checkpoints, each with a description of the damage.
    over: True if the run begins anew although it has made steps.
    """

    whole: Location | None
    damaged: dict[Location, str]
    over: bool


def find_start(folder: Path, saved: Location, world: World, start_over: bool) -> Start:
    """Find where the run starts. All processes call it together. saved: the folder of its checkpoints.

    Unless `start_over` is set, raises ConfigError if there is no checkpoint although the records have steps, and
    NoneWhole if all checkpoints are damaged.
    """
    try:
        newest, is_lost = newest_whole(saved, world), False
    except NoneWhole:
        if not start_over:
            raise
        newest, is_lost = Found(None, {}), True

    def check() -> bool:
        if newest.whole is not None or not world.is_main:
            return False
        step = last_step(folder)
        if step and not start_over:
            raise ConfigError(
                f"{folder} has records up to step {step}, and no checkpoint to go on from: bring back {saved}, "
                "choose another run.name, or add run.start_over=true, which moves the run's files to "
                f"{folder}/{EARLIER}"
            )
        return is_lost or step > 0

    return Start(newest.whole, newest.damaged, world.all_or_raise(check)[0])


def settings_of(folder: Path, checkpoint: Location, config: Config) -> Config:
    """The newest settings of the run, from its folder or, if they are missing there, from its checkpoint.

    Raises ConfigError if the checkpoint is of another run.
    """
    saved = load_resolved(checkpoint / CONFIG)
    check_same_run(saved, config, str(checkpoint))
    path = folder / CONFIG
    return load_resolved(path) if path.exists() else saved


def keep(folder: Path, saved: Location, start: Start, step: int, attempt: int) -> list[str]:
    """Keep the files that an attempt starting at `step` would drop, and return lines that report it.

    If the run starts over, all its files are moved. Damaged checkpoints are set aside. If there were checkpoints newer
    than `step`, the records are copied, since the attempt drops those of many steps. saved: as in `find_start`.
    """
    if start.over:
        for path in checkpoints(saved) if saved != folder / CHECKPOINTS else ():
            set_aside(path)
        return [f"starts over; the earlier files of the run are kept in {_move_all(folder)}"]
    if start.whole is None:
        return []
    lines, newest, records = list[str](), _newest_checkpoint_step(folder, saved), folder / METRICS
    if newest > step and records.exists():
        copy = _copy(records, folder / f"metrics-before-attempt-{attempt}.jsonl")
        lines.append(f"the records until now are kept in {copy.name}: those of later steps than {step} are made anew")
    for path, damage in start.damaged.items():
        lines.append(f"{path.name} is damaged ({damage}); set aside as {set_aside(path).name}")
    if newest > step:
        lines += [] if start.damaged else [f"the checkpoint of step {newest} is gone"]
        lines.append(f"going on from the checkpoint of step {step}")
        point_to(step_folder(saved, step), folder / CHECKPOINTS)
    if step and not records.exists():
        lines.append(f"{records} is gone: there are no records of the first {step} steps")
    return lines


def last_step(folder: Path) -> int:
    """The last step in the records and the status of the run in a folder; 0 if there is none."""
    path, status = folder / METRICS, read_status(folder)
    records = MetricsStream(path) if path.exists() else ()
    return max([status["step"] if status else 0, *(record["step"] for record in records)])


def _move_all(folder: Path) -> Path:
    """Move all files of a run into a new folder and return it."""
    numbers = [int(path.name) for path in (folder / EARLIER).glob("*") if path.name.isdecimal()]
    target = folder / EARLIER / str(max(numbers, default=0) + 1)
    target.mkdir(parents=True)
    for name in RUN_FILES:
        if (folder / name).exists():
            os.rename(folder / name, target / name)
    sync(folder)
    return target


def _newest_checkpoint_step(folder: Path, saved: Location) -> int:
    """The step of the newest checkpoint that the run has had, whether it is still there or not; 0 if there is none."""
    steps, status = [0], read_status(folder)
    steps += [step_of(path) for path in checkpoints(saved)]
    if status and status["state"] == State.FINISHED:
        steps.append(status["step"])
    latest = folder / CHECKPOINTS / LATEST
    name = latest.read_text(errors="replace").strip().removeprefix("step-") if latest.is_file() else ""
    return max([*steps, int(name) if name.isdecimal() and len(name) <= DIGITS else 0])


def _copy(path: Path, copy: Path) -> Path:
    """Copy a file atomically. An existing copy stays: its attempt was killed before it wrote a record."""
    if not copy.exists():
        partial = beside(copy, "partial")
        shutil.copyfile(path, partial)
        sync(partial)
        os.rename(partial, copy)
    return copy
