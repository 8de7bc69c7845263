"""Opening of a run: build its parts, take the lease on its folder, and begin anew or go on from a checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.commit import remove_unfinished
from sleeptrain.checkpoint.folder import checkpoint_folder
from sleeptrain.config.changes import check_changes
from sleeptrain.config.resolved import run_folder, save_resolved, shareable
from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.source import Source, build_source
from sleeptrain.distributed.world import World
from sleeptrain.errors import naming
from sleeptrain.files import remove_leftovers
from sleeptrain.remote import Location
from sleeptrain.train.attempt import Attempt, this_attempt
from sleeptrain.train.changes import keep_changes
from sleeptrain.train.earlier import Start, find_start, keep, settings_of
from sleeptrain.train.engine import Engine, build_engine
from sleeptrain.train.init_from import start_from
from sleeptrain.train.logging.metrics import METRICS, MetricsFile, MetricsStream, position
from sleeptrain.train.logging.progress_line import ProgressLine
from sleeptrain.train.logging.wandb_log import WandbLogger
from sleeptrain.train.recompute import recompute_stages
from sleeptrain.train.restore import Restored, restore
from sleeptrain.train.run_log import MainRunLog, RunLog
from sleeptrain.train.run_state import Run
from sleeptrain.train.status import Status
from sleeptrain.train.stopping import Stopping
from sleeptrain.watch.progress import Progress


def open_run(config: Config, world: World, progress: Progress, stopping: Stopping, status: Status) -> Run | None:
    """Make the run folder, or go on from its newest whole checkpoint; then open the records.

    All processes call it together. Data is read before the lease is taken. Only the main process writes, and only while
    it has the lease on the folder. Returns None, with nothing open, if the run was to stop while another process had
    the lease.
    Raises LeaseError if another process goes on with the run. Raises ConfigError if the folder has a run with another
    configuration, or records that a new start would lose. Raises DataError if the folder cannot be written, if all
    checkpoints are damaged or do not fit, or if processes see different checkpoints. Raises CheckpointError if the
    first checkpoint of a new run cannot be written.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.train.seed)
    source = build_source(config.data, world.part, stopping.stop_requested)
    config = with_vocabulary(config, source.vocab_size)
    engine, recompute = build_engine(config, world, progress), recompute_stages(config, world)
    folder = run_folder(config)
    if not all(world.all_or_raise(lambda: _take_lease(config, world, stopping, status))):
        return None
    start = find_start(folder, checkpoint_folder(config), world, config.run.start_over)
    restored, changes = Restored(), list[str]()
    if start.whole is not None:
        restored, changes = _resume(config, world, engine, source, start.whole)
    elif config.run.init_from:
        start_from(config, engine, world, source.tokenizer_hash)
    attempt = this_attempt(_last_attempt(folder, world, status) + 1, world)
    log = _open_log(config, world, status, restored, start, attempt, changes)
    run = Run(config, world, progress, stopping, status, source, engine, log, restored, recompute)
    if run.owes_evaluation and world.from_first(world.is_main and _has_evaluation(folder, run.step)):
        run.owes_evaluation = False
    if start.whole is None:
        run.save()  # a run that is killed at once is still resumed as the same run
        run.finish_saving()
    return run


def _take_lease(config: Config, world: World, stopping: Stopping, status: Status) -> bool:
    if not world.is_main:
        return True

    def facts() -> dict[str, Any]:
        status.read()  # an attempt that has just ended may have changed it
        return {"attempt": _last_attempt(run_folder(config), world, status) + 1}

    with naming(f"run.root={config.run.root}: the run folder cannot be made or written"):
        return status.lease.take(os.environ.get("SLURM_JOB_ID"), facts, stopping.stop_requested)


def _last_attempt(folder: Path, world: World, status: Status) -> int:
    """The number of the run's last attempt, from its records and its status; 0 if there is none."""
    path = folder / METRICS
    records = MetricsStream(path) if world.is_main and path.exists() else ()
    return max([status.last_attempt, *(r["attempt"]["number"] for r in records if "attempt" in r)])


def _resume(
    config: Config, world: World, engine: Engine, source: Source, checkpoint: Location
) -> tuple[Restored, list[str]]:
    """Restore a checkpoint; also return the changed settings as lines. If one process cannot read it, all raise."""
    folder = run_folder(config)
    changes = world.all_or_raise(lambda: check_changes(settings_of(folder, checkpoint, config), config, str(folder)))[0]
    restored = restore(checkpoint, engine, config.model, world)
    world.all_or_raise(lambda: source.load_state_dict(restored.data))
    return restored, changes


def _open_log(
    config: Config,
    world: World,
    status: Status,
    restored: Restored,
    start: Start,
    attempt: Attempt,
    changes: Sequence[str],
) -> RunLog:
    """Open the records of this process. If the main process cannot open them, all raise."""
    logs = [RunLog()]

    def open_main() -> None:
        if world.is_main:
            logs.append(_open_main_log(config, status, restored, start, attempt, changes))

    world.all_or_raise(open_main)
    return logs[-1]


def _open_main_log(
    config: Config, status: Status, restored: Restored, start: Start, attempt: Attempt, changes: Sequence[str]
) -> MainRunLog:
    folder = run_folder(config)
    with naming(f"run.root={config.run.root}: the run folder cannot be written"):
        status.lease.check()
        saved = checkpoint_folder(config)
        remove_leftovers(folder)
        remove_unfinished(saved)
        lines = keep(folder, saved, start, restored.step, attempt.number)
        progress_line = ProgressLine(config.train.tokens)
        metrics = MetricsFile(folder / METRICS)
        metrics.truncate_after(restored.step, restored.rollbacks.total)
        begins = position(restored.step, restored.tokens, restored.flops, time.time())
        metrics.append(begins | {"attempt": asdict(attempt)})
        status.begin(attempt, restored.step, restored.tokens)
        if config.run.start_over and start.whole is not None:
            lines.append(f"run.start_over=true: there is a checkpoint, so the run goes on from step {restored.step}")
        if changes:
            keep_changes(folder, attempt.number, restored.step, changes)
            lines.append("\n".join(["changed since the attempt before:", *(f"  {line}" for line in changes)]))
        for line in lines:
            progress_line.message(line)
        save_resolved(config, folder / "config.yaml")
    wandb = WandbLogger(config.wandb, folder, config.run.name, shareable(config), restored.wandb_id)
    return MainRunLog(metrics, wandb, progress_line)


def _has_evaluation(folder: Path, step: int) -> bool:
    """True if a later attempt has made the evaluation that this step owed."""
    return any("eval" in record for record in MetricsStream(folder / METRICS) if record["step"] == step)
