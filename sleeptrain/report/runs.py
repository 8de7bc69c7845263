"""Find the folders of runs on the disk, and read them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sleeptrain.checkpoint.folder import TENSORS, checkpoints, checkpoints_of, find_damage, read_state
from sleeptrain.config import load_resolved
from sleeptrain.config.schema import Config
from sleeptrain.config.validate import validate
from sleeptrain.errors import ConfigError, DataError, UserError
from sleeptrain.remote import Location, UrlPath
from sleeptrain.report.records import Records, collect
from sleeptrain.train.logging.metrics import MetricsStream, Record
from sleeptrain.train.logging.record_schema import faults
from sleeptrain.train.status import FILE as STATUS
from sleeptrain.train.status import State, read_status

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
# Folders inside a run's folder that hold no other run.
INNER_FOLDERS = ("checkpoints", "wandb", "report", "earlier")


@dataclass
class ReadRun:
    """A run, read from its files. status: the content of `status.json`; None if there is none."""

    folder: Path
    config: Config
    records: Records
    status: dict[str, Any] | None

    @property
    def evaluations(self) -> list[Record]:
        return self.records.evaluations

    @property
    def finished(self) -> bool:
        return self.status is not None and self.status["state"] == State.FINISHED

    @property
    def state(self) -> str:
        """The state of the run, in words. If it is not finished: how far it is, and the reason if known."""
        if self.finished:
            return "finished"
        step, tokens = self.records.furthest
        how_far = f"at step {step:,}, {tokens / self.config.train.tokens:.0%} of its tokens"
        if self.status is None:
            why = f"{STATUS} cannot be read" if (self.folder / STATUS).exists() else f"no {STATUS}"
            return f"NOT KNOWN ({why}), {how_far}"
        state, reason = self.status["state"], self.status.get("reason")
        if state == State.RUNNING:
            noted = self.status.get("progress_at")
            when = "" if noted is None else f"; last noted {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(noted))}"
            return f"NOT FINISHED: running, or killed, {how_far}{when}"
        return f"{str(state).upper()} {how_far}" + (f": {reason}" if reason else "")

    @property
    def notes(self) -> list[str]:
        """Remarks for a reader of the curves."""
        records, notes = self.records, []
        if records.cut_short:
            notes.append(f"the last line of {METRICS} is cut short and left out")
        if not self.evaluations:
            notes.append("no evaluation yet: not in the curves")
        if records.skipped:
            notes.append(f"{records.skipped} steps skipped")
        if records.rollbacks or records.rolled_back:
            notes.append("rolled back to a checkpoint; steps undone by it are not counted")
        if self.config.sleep.sample_passes:
            notes.append("N is drawn anew at each step: an evaluation has the N of its step")
        if self.newest is not None and (damage := self.newest[1]) is not None:
            notes.append(f"its newest checkpoint, {self.newest[0].name}, is damaged: {damage}")
        if (self.folder / "changes.jsonl").exists():
            notes.append("settings were changed during the run (changes.jsonl); the last ones are shown")
        if isinstance(place := checkpoints_of(self.folder), UrlPath):
            notes.append(f"its checkpoints are in {place}, which was not asked for them")
        return notes

    @property
    def code(self) -> list[str]:
        """The distinct code versions of the attempts."""
        return list(dict.fromkeys(record["attempt"]["code"] for record in self.records.attempts))

    @cached_property
    def newest(self) -> tuple[Location, str | None] | None:
        """(newest checkpoint, its damage or None); None without a checkpoint, or if they are in an object store.

        Tensors are not read.
        """
        place = checkpoints_of(self.folder)
        saved = [] if isinstance(place, UrlPath) else checkpoints(place)
        try:
            return (saved[-1], find_damage(saved[-1], tensors=False)) if saved else None
        except DataError as error:
            return saved[-1], str(error)

    @cached_property
    def parameters(self) -> int | None:
        """The number of the model's parameters, from the headers of the newest checkpoint; None without a sound one.

        A tensor in fragments counts once: each element is in one of them. Read without torch.
        """
        if self.newest is None or self.newest[1] is not None:
            return None
        files = sorted(Path(str(self.newest[0])).glob(TENSORS))
        try:
            return sum(map(_elements, files))
        except (SafetensorError, OSError):
            return None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of torch and Python in the newest checkpoint. Empty if there is none, or it is damaged."""
        if self.newest is None or self.newest[1] is not None:
            return {}
        return read_state(self.newest[0]).get("versions", {})

    @cached_property
    def flops(self) -> dict[int, int] | str:
        """{step: training FLOPs up to it}: as recorded, or counted from the configuration for runs of older versions.

        If the count fails, such as for lost files of a task, the error message.
        """
        if (recorded := self.records.flops) is not None:
            return recorded
        # Not at the top: it loads torch, which takes a second that a report of recorded FLOPs does not need.
        from sleeptrain.report.cost import training_flops

        try:
            return training_flops(self.config, self.records)
        except UserError as error:
            return str(error)

    def flops_until(self, step: int) -> int | None:
        """Training FLOPs up to a step; None if not known."""
        return None if isinstance(self.flops, str) else self.flops.get(step)


def find_runs(paths: Sequence[Path]) -> tuple[list[ReadRun], list[str]]:
    """Return (runs in `paths`, a message for each folder and run that cannot be read).

    paths: run folders, or folders that hold runs at any depth. Runs are sorted by folder, each is in the list once.
    Raises DataError if a path holds no run, or if no run can be read.
    """
    by_path: dict[Path, Path] = {}
    unreadable: list[str] = []
    for path in paths:
        if not os.path.isdir(path):  # unlike Path.is_dir, it never raises
            raise DataError(f"{path} is no folder; give the folder of a run or of several")
        closed: list[str] = []
        folders = list(_folders(path, set(), closed))
        if not folders and not closed:
            raise DataError(f"{path} holds no run: no folder in it has a {METRICS}")
        by_path |= {folder.resolve(): folder for folder in folders}
        unreadable += [reason for reason in closed if reason not in unreadable]
    runs = []
    for folder in sorted(by_path.values()):
        try:
            runs.append(_read(folder))
        except UserError as error:
            unreadable.append(str(error))
    if not runs:
        raise DataError(unreadable[0], unreadable[1:])
    return runs, unreadable


def _folders(path: Path, seen: set[Path], closed: list[str]) -> Iterator[Path]:
    """The run folders in `path`, with those inside other run folders.

    seen: resolved folders already visited, so that links cannot lead back. closed: messages about unreadable folders.
    Both are extended.
    """
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    try:
        is_run = (path / METRICS).exists() or (path / CONFIG).exists() or read_status(path) is not None
        below = sorted(inside for inside in path.iterdir() if inside.is_dir() and not inside.name.startswith("."))
    except OSError as error:
        closed.append(f"{path} cannot be read: {error.strerror}")
        return
    if is_run:
        yield path
    for inside in below:
        if not (is_run and inside.name in INNER_FOLDERS):
            yield from _folders(inside, seen, closed)


def _elements(file: Path) -> int:
    """The elements of the model's tensors in a safetensors file."""
    with safe_open(file, framework="np") as opened:
        return sum(prod(opened.get_slice(key).get_shape()) for key in sorted(opened.keys()) if key.startswith("model/"))


def _read(folder: Path) -> ReadRun:
    for name in (METRICS, CONFIG):
        if not (folder / name).exists():
            raise DataError(
                f"{folder} is the folder of a run that has no {name}; bring it back, or name the other runs"
            )
    stream = MetricsStream(folder / METRICS)
    records = collect(_checked(stream))
    records.cut_short = stream.cut_short
    config = load_resolved(folder / CONFIG)
    try:
        validate(config)
    except ConfigError as error:
        raise DataError(f"{folder / CONFIG} is no configuration that runs: {error}") from error
    return ReadRun(folder, config, records, read_status(folder))


def _checked(stream: MetricsStream) -> Iterator[Record]:
    """The records of the stream. Raises DataError for a record that this version would not write."""
    for record in stream:
        if missing := faults(record):
            raise DataError(
                f"{stream.path}: the record of step {record['step']} has no {', '.join(missing)}: the run is of an "
                "older format; report it with the version that made it, or remove the line where it is damaged"
            )
        yield record
