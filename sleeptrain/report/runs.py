"""Runs as they lie on the disk: which folders hold one, and what each of them says about itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.folder import checkpoints, find_damage, read_state
from sleeptrain.config import load_resolved
from sleeptrain.config.schema import Config
from sleeptrain.config.validate import validate
from sleeptrain.errors import ConfigError, DataError, UserError
from sleeptrain.report.cost import training_flops
from sleeptrain.report.records import Records, collect
from sleeptrain.train.logging.metrics import MetricsStream, Record
from sleeptrain.train.logging.record_schema import faults
from sleeptrain.train.status import FILE as STATUS
from sleeptrain.train.status import State, read_status

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
# What a run keeps in its folder, where no other run is.
KEPT = ("checkpoints", "wandb", "report", "earlier")


@dataclass
class ReadRun:
    """A run as its files tell it. status: `status.json`, if any."""

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
        """How the run stands, in words; what is not finished says how far it is, and why where that is known."""
        if self.finished:
            return "finished"
        step, tokens = self.records.furthest
        far = f"at step {step:,}, {tokens / self.config.train.tokens:.0%} of its tokens"
        if self.status is None:
            why = f"{STATUS} cannot be read" if (self.folder / STATUS).exists() else f"no {STATUS}"
            return f"NOT KNOWN ({why}), {far}"
        state, reason = self.status["state"], self.status.get("reason")
        if state == State.RUNNING:
            noted = self.status.get("progress_at")
            when = "" if noted is None else f"; last noted {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(noted))}"
            return f"NOT FINISHED: running, or killed, {far}{when}"
        return f"{str(state).upper()} {far}" + (f": {reason}" if reason else "")

    @property
    def notes(self) -> list[str]:
        """What a reader of the curves must know."""
        records, found = self.records, []
        if records.cut_short:
            found.append(f"the last line of {METRICS} is cut short and left out")
        if not self.evaluations:
            found.append("no evaluation yet: not in the curves")
        if records.skipped:
            found.append(f"{records.skipped} steps passed over")
        if records.rollbacks or records.rolled_back:
            found.append("went back to a checkpoint; what was taken back is not counted")
        if self.config.sleep.sample_passes:
            found.append("N is drawn anew at each step: an evaluation has the N of its step")
        if self.newest is not None and (damage := self.newest[1]) is not None:
            found.append(f"its newest checkpoint, {self.newest[0].name}, is damaged: {damage}")
        if (self.folder / "changes.jsonl").exists():
            found.append("settings were changed on the way (changes.jsonl); the last ones are shown")
        return found

    @property
    def code(self) -> list[str]:
        """What the code of each attempt was, each once."""
        return list(dict.fromkeys(record["attempt"]["code"] for record in self.records.attempts))

    @cached_property
    def newest(self) -> tuple[Path, str | None] | None:
        """The newest checkpoint, if any, and what is wrong with it, as far as is seen without reading its tensors."""
        saved = checkpoints(self.folder / "checkpoints")
        try:
            return (saved[-1], find_damage(saved[-1], tensors=False)) if saved else None
        except DataError as error:
            return saved[-1], str(error)

    @property
    def versions(self) -> dict[str, str]:
        """Of torch and Python, as the newest checkpoint says; nothing where there is none that is whole."""
        if self.newest is None or self.newest[1] is not None:
            return {}
        return read_state(self.newest[0]).get("versions", {})

    @cached_property
    def flops(self) -> dict[int, int] | str:
        """As `training_flops`; in words why they are not known, where the task's files are gone."""
        try:
            return training_flops(self.config, self.records)
        except UserError as error:
            return str(error)

    def flops_until(self, step: int) -> int | None:
        return None if isinstance(self.flops, str) else self.flops.get(step)


def find_runs(paths: Sequence[Path]) -> tuple[list[ReadRun], list[str]]:
    """The runs in `paths`, each a run folder or a folder of runs at any depth; each run once, by name.

    Behind them, in a line each, the folders and runs that cannot be read, and why. Raises DataError where a path holds
    no run, or none can be read.
    """
    found: dict[Path, Path] = {}
    unreadable: list[str] = []
    for path in paths:
        if not os.path.isdir(path):  # which never raises
            raise DataError(f"{path} is no folder; give the folder of a run or of several")
        closed: list[str] = []
        folders = list(_folders(path, set(), closed))
        if not folders and not closed:
            raise DataError(f"{path} holds no run: no folder in it has a {METRICS}")
        found |= {folder.resolve(): folder for folder in folders}
        unreadable += [reason for reason in closed if reason not in unreadable]
    runs = []
    for folder in sorted(found.values()):
        try:
            runs.append(_read(folder))
        except UserError as error:
            unreadable.append(str(error))
    if not runs:
        raise DataError(unreadable[0], unreadable[1:])
    return runs, unreadable


def _folders(path: Path, seen: set[Path], closed: list[str]) -> Iterator[Path]:
    """The folders of runs in `path`, also those inside of others.

    seen: folders, resolved, that links shall not lead back to. closed: takes what cannot be read. Both are added to.
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
        if not (is_run and inside.name in KEPT):
            yield from _folders(inside, seen, closed)


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
    """Its records. Raises DataError for one that is not as this version writes it."""
    for record in stream:
        if missing := faults(record):
            raise DataError(
                f"{stream.path}: the record of step {record['step']} has no {', '.join(missing)}: the run is of an "
                "older format; report it with the version that made it, or remove the line where it is damaged"
            )
        yield record
