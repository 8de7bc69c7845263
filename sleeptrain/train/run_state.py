"""A run: all that a training job holds, built from its configuration, saved to and restored from its folder."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.find import newest_whole
from sleeptrain.checkpoint.fit import check_resume
from sleeptrain.checkpoint.folder import CONFIG, STATE, read_state
from sleeptrain.checkpoint.keep import remove_after
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.state_schema import OF_A_RUN
from sleeptrain.checkpoint.vocabulary import TOKENIZER
from sleeptrain.config import Config, resolved_yaml, run_folder, save_resolved
from sleeptrain.config.changes import check_changes
from sleeptrain.config.resolved import shareable
from sleeptrain.data.ahead import Cancelled
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.source import build_source
from sleeptrain.distributed.launch import shared_reading
from sleeptrain.distributed.world import World
from sleeptrain.errors import CheckpointError, ConfigError, HealthError, naming
from sleeptrain.files import remove_leftovers
from sleeptrain.health.rollbacks import Rollbacks, reach
from sleeptrain.health.spikes import SpikeDetector
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train.attempt import Attempt, this_attempt
from sleeptrain.train.changes import keep_changes
from sleeptrain.train.earlier import Start, find_start, keep, settings_of
from sleeptrain.train.engine import build_engine
from sleeptrain.train.init_from import start_from
from sleeptrain.train.logging.metrics import METRICS, MetricsFile, MetricsStream
from sleeptrain.train.logging.progress_line import ProgressLine
from sleeptrain.train.logging.wandb_log import WandbLogger
from sleeptrain.train.status import Status
from sleeptrain.train.stopping import Stopping
from sleeptrain.watch.progress import Phase, Progress

RNG = "rng/torch"


class Run:
    """Model, optimizers, data, position and logs of one job; in each of its processes, this one's part of them.

    world: the processes, which have met. progress: of this one, kept current. stopping: whether it stops before its
    end. status: the file that says how it stands. Building it reads data; only `open` writes anything, and only where
    `world.leads`, and only while it has the lease on the folder, that of the status.
    """

    def __init__(self, config: Config, world: World, progress: Progress, stopping: Stopping, status: Status):
        self.config, self.world, self.progress = config, world, progress
        self.stopping, self.status, self.lease = stopping, status, status.lease
        self.folder = run_folder(config)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.source = build_source(config.data, world.part, stopping.asked)
        _settle_vocabulary(config, self.source.vocab_size)
        self._resolved = resolved_yaml(config)
        self.reading = shared_reading(self.source, world)
        self.engine = build_engine(config, world, progress)
        self.saver = Saver(self.folder / "checkpoints", world, config.checkpoint, self.message, reach(config.health))
        self.spikes = SpikeDetector(config.health.spike_factor, config.health.spike_window)
        self.rollbacks = Rollbacks()
        self.step = self.tokens = self.samples = self.skipped = 0
        self.carried: FastWeights | None = None
        self.shape: StepShape | None = None  # the curriculum's, for the last step
        self.owes_evaluation = False  # of the last step: it was given up when the run was stopped
        self.precision_proven = False  # by the first step of this start
        self._wandb_id: str | None = None
        # Of the records: a clock that is set meanwhile moves none of them.
        self._date = time.time() - time.monotonic()

    @property
    def model(self) -> Hybrid:
        return self.engine.model

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def done(self) -> bool:
        """All steps are done."""
        return self.tokens >= self.config.train.tokens

    @property
    def finished(self) -> bool:
        """There is nothing left to do."""
        return self.done and not self.owes_evaluation

    def open(self) -> bool:
        """Makes the run folder, or goes on where its newest whole checkpoint stands; then opens the logs.

        False where it was asked to stop while another process had the folder: then nothing is open. Raises LeaseError
        where another one goes on with the run, ConfigError when the folder holds a run of another configuration or
        records that a new beginning would lose, DataError where it cannot be written, all checkpoints are damaged or do
        not fit, or not all processes see the same ones, CheckpointError where the first one of a new run cannot be
        written.
        """
        if not all(self.world.all_or_raise(self._take_lease)):
            return False
        start = find_start(self.folder, self.world, self.config.run.start_over)
        changes: list[str] = []
        if start.whole is not None:
            changes = self.world.all_or_raise(partial(self._go_on, start.whole))[0]
        elif self.config.run.init_from:
            start_from(self.config, self.engine, self.world, self.source.tokenizer_hash)
        attempt = this_attempt(self._attempts() + 1, self.world)
        self.world.all_or_raise(partial(self._open_logs, attempt, changes, start))
        self._settle_owed()
        if start.whole is None:
            self.save()  # from the first moment on a killed run keeps its identity
            self.finish_saving()
        return True

    def _take_lease(self) -> bool:
        if not self.world.is_main:
            return True

        def facts() -> dict[str, Any]:
            self.status.read()  # the attempt that has just ended has written it
            return {"attempt": self._attempts() + 1}

        with naming(f"run.root={self.config.run.root}: the run folder cannot be made or written"):
            return self.lease.take(os.environ.get("SLURM_JOB_ID"), facts, self.stopping.asked)

    def _attempts(self) -> int:
        """How often the run has been started, by what is left of its files."""
        path = self.folder / METRICS
        records = MetricsStream(path) if self.world.is_main and path.exists() else ()
        return max([self.status.last_attempt, *(r["attempt"]["number"] for r in records if "attempt" in r)])

    def _open_logs(self, attempt: Attempt, changes: list[str], start: Start) -> None:
        if not self.world.is_main:
            return
        with naming(f"run.root={self.config.run.root}: the run folder cannot be written"):
            self.lease.check()
            self._open_files(attempt, changes, start)
        told = shareable(self.config)
        self.wandb = WandbLogger(self.config.wandb, self.folder, self.config.run.name, told, self._wandb_id)
        self._wandb_id = self.wandb.run_id

    def _open_files(self, attempt: Attempt, changes: list[str], start: Start) -> None:
        for folder in (self.folder, self.saver.folder):
            remove_leftovers(folder)
        lines = keep(self.folder, start, self.step, attempt.number)
        self.progress_line = ProgressLine(self.config.train.tokens)
        self.metrics = MetricsFile(self.folder / METRICS)
        self.metrics.truncate_after(self.step, self.rollbacks.total)
        self.metrics.append(self._here() | {"attempt": asdict(attempt)})
        self.status.begin(attempt, self.step, self.tokens)
        if self.config.run.start_over and start.whole is not None:
            lines.append(f"run.start_over=true: there is a checkpoint, so the run goes on from step {self.step}")
        for line in lines:
            self.message(line)
        if changes:
            keep_changes(self.folder, attempt.number, self.step, changes)
            self.message("\n".join(["changed since the attempt before:", *(f"  {line}" for line in changes)]))
        save_resolved(self.config, self.folder / "config.yaml")

    def _settle_owed(self) -> None:
        """An evaluation that an attempt since has made is not owed any longer."""
        if not self.owes_evaluation:
            return
        made = False
        if self.world.is_main:
            records = MetricsStream(self.metrics.path)
            made = any("eval" in record for record in records if record["step"] == self.step)
        if self.world.from_first(made):
            self.owes_evaluation = False

    def close(self) -> None:
        if not self.world.is_main:
            return
        self.progress_line.close()
        self.metrics.close()
        self.wandb.finish()

    def next_batch(self, num_rows: int) -> tuple[Batch, int] | None:
        """This process's rows of the next batch of `num_rows`, and the tokens of all rows (pads are none).

        None where some process was asked to stop while it waited for data; then no process has gone on.
        """
        self.progress.begin_step(self.step + 1)
        position = self.source.state_dict()
        try:
            batch = self.reading.batch(num_rows)
        except Cancelled:
            batch = None
        own = 0 if batch is None else int((batch.documents_BT != PAD).sum())
        tokens, given_up = self.world.sum(own, batch is None)
        if batch is None or given_up:
            self.source.load_state_dict(position)
            return None
        return batch, round(tokens / self.world.model_parallel_size)

    def advance(self, batch: Batch, num_tokens: int, state: FastWeights) -> None:
        """One step is done: counts its tokens (pads are none) and keeps the memory of the rows that go on."""
        self._keep_lease()
        self.step += 1
        self.tokens += num_tokens
        self.samples += batch.tokens_BT.shape[0] * self.world.part.ranks
        self.carried = state if bool(batch.continues_B.any()) else None
        self.saver.poll()
        self.stopping.save_needs = max(self.saver.needs, self.status.save_seconds)
        self.status.progress(self.step, self.tokens, self.saver.longest)

    def _here(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "time": self._date + time.monotonic()}

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record to the metrics file, wandb and the progress line."""
        if not self.world.is_main:
            return
        self._keep_lease()
        record = self._here() | record
        failed_before = self.metrics.failed
        self.metrics.append(record)
        if self.metrics.failed and not failed_before:
            self.message(
                f"ALARM: {self.metrics.path} takes no records ({self.metrics.failed}); they are kept and retried"
            )
        self.wandb.log(record, self.step + self.rollbacks.undone)
        self.progress_line.update(record)

    def _keep_lease(self) -> None:
        """Raises LeaseError where it is known that another process has taken the run over."""
        if self.world.is_main:
            self.lease.check_known()

    def message(self, text: str) -> None:
        if self.world.is_main:
            self.progress_line.message(text)

    def save(self) -> None:
        """Begins to write a checkpoint, in one format for all layouts, unless that of this step is there."""
        self.progress.begin(Phase.SAVING)
        self.saver.make_way(self.step)
        if self.saver.newest != self.step:
            self._keep_lease()
            tensors = self.engine.local_tensors(self.carried)
            documents = {STATE: json.dumps(self._state(), indent=1).encode(), CONFIG: self._resolved}
            if self.world.is_main:
                tensors[RNG] = torch.get_rng_state()
            # Records first: a run that goes on from the checkpoint must find those of all steps before.
            self.saver.start(self.step, tensors, documents, self._before_commit)

    def _before_commit(self) -> None:
        """In the thread that saves, of the process that leads."""
        self.lease.check()
        self.metrics.sync()

    def finish_saving(self) -> None:
        """Waits for the last checkpoint. Raises CheckpointError where it was not written, LeaseError in place of it."""
        try:
            self.saver.finish()
        except CheckpointError:
            self._keep_lease()
            raise

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; rates and the curriculum are functions of the tokens."""
        mesh = self.world.mesh
        return {
            "step": self.step,
            "tokens": self.tokens,
            "samples": self.samples,
            "skipped": self.skipped,
            "spikes": self.spikes.state_dict(),
            "rollbacks": asdict(self.rollbacks),
            "data": self.source.state_dict(),
            TOKENIZER: self.source.tokenizer_hash,
            "wandb_id": self._wandb_id,
            "shape": None if self.shape is None else asdict(self.shape),
            "owes_evaluation": self.owes_evaluation,
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "written_by": {
                "tensor": mesh.tensor.size,
                "pipeline": mesh.pipeline.size,
                "data": mesh.data.size,
                "zero": self.config.parallel.zero,
            },
        }

    def _go_on(self, checkpoint: Path) -> list[str]:
        """Each process reads for itself; where one cannot, none goes on. What has changed in the settings."""
        changes = check_changes(settings_of(self.folder, checkpoint, self.config), self.config, str(self.folder))
        saved = self._restore(checkpoint)
        self._wandb_id, self.rollbacks = saved["wandb_id"], Rollbacks(**saved["rollbacks"])
        self.source.load_state_dict(saved["data"])
        self.owes_evaluation = saved["owes_evaluation"]
        return changes

    def _restore(self, checkpoint: Path) -> dict[str, Any]:
        """Takes over what a step changes, but for the position in the data; returns all that is no tensor."""
        saved, files = read_state(checkpoint, OF_A_RUN), TensorFiles(checkpoint)
        check_resume(files.forms, self.config.model)
        self.step, self.tokens, self.samples = saved["step"], saved["tokens"], saved["samples"]
        self.shape = StepShape(**saved["shape"]) if saved["shape"] else None
        self.skipped = saved["skipped"]
        self.spikes.load_state_dict(saved["spikes"])
        self.carried = self.engine.load(files)
        files.read({RNG: torch.set_rng_state})
        self.saver.newest = self.step
        return saved

    def roll_back(self, why: str) -> None:
        """Goes back to the last checkpoint that is taken for good, now that the step under way has gone wrong.

        The data goes on behind that step, with empty memory. Checkpoints and records behind the checkpoint are removed:
        the run goes on as if it had read other data there. Raises HealthError where there is none.
        """
        self.progress.begin(Phase.ROLLBACK)
        self.saver.wait()
        bad_step = self.step + 1
        last = self.rollbacks.good_until(bad_step, self.config.health.spike_window)
        found = newest_whole(self.saver.folder, self.world, last)
        if found.whole is None:
            raise HealthError(
                f"{why}. There is no checkpoint of step {last} or before to go back to (health.spike_window); "
                "health.on_spike=skip and health.on_nonfinite=skip pass over such steps"
            )
        for path, damage in found.damaged.items():
            self.message(f"{path.name} is damaged ({damage}); the one before is taken")
        self.world.all_or_raise(partial(self._restore, found.whole))
        self.carried = None
        self.rollbacks.taken_back(bad_step, self.step)
        if self.world.is_main:
            self.lease.check()
            remove_after(self.saver.folder, self.step)
            self.metrics.truncate_after(self.step, self.rollbacks.total)
        self.log({"rollback": {"number": self.rollbacks.total, "bad_step": bad_step, "why": why}})
        self.message(f"rollback {self.rollbacks.total}: {why}; going on from step {self.step} with the data behind")


def _settle_vocabulary(config: Config, vocab_size: int) -> None:
    if config.model.vocab_size == 0:
        config.model.vocab_size = vocab_size
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the data's {vocab_size}; "
            "leave it 0 to take the data's"
        )
