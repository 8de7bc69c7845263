"""A run: all that a training job holds, built from its configuration, saved to and restored from its folder."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from sleeptrain.config import Config, load_resolved, run_folder, save_resolved
from sleeptrain.config.changes import check_changes
from sleeptrain.data.ahead import GivenUp
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.source import build_source
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.launch import shared_reading
from sleeptrain.parallel.world import World
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train.attempt import Attempt, this_attempt
from sleeptrain.train.changes import keep_changes
from sleeptrain.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sleeptrain.train.engine import build_engine
from sleeptrain.train.metrics import MetricsFile, read_metrics
from sleeptrain.train.progress import Progress
from sleeptrain.train.status import Status
from sleeptrain.train.stopping import Stopping
from sleeptrain.train.wandb_log import WandbLogger
from sleeptrain.watch.whereabouts import Phase, Whereabouts

METRICS = "metrics.jsonl"


class Run:
    """Model, optimizers, data, position and logs of one job; in each of its processes, this one's part of them.

    world: the processes, which have met. whereabouts: of this one, kept current. stopping: whether it stops before its
    end. status: the file that says how it stands. Building it reads data; only `open` writes anything, and only where
    `world.leads`.
    """

    def __init__(self, config: Config, world: World, whereabouts: Whereabouts, stopping: Stopping, status: Status):
        self.config, self.world, self.whereabouts = config, world, whereabouts
        self.stopping, self.status = stopping, status
        self.folder = run_folder(config)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.source = build_source(config.data, world.part, stopping.asked)
        _settle_vocabulary(config, self.source.vocab_size)
        self.reading = shared_reading(self.source, world)
        self.engine = build_engine(config, world, whereabouts)
        self.step = self.tokens = self.skipped = 0
        self.carried: FastWeights | None = None
        self.owed: StepShape | None = None  # of the step whose evaluation was given up when the run was stopped
        self._saved_step: int | None = None
        self._wandb_id: str | None = None

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
        return self.done and self.owed is None

    def open(self) -> Run:
        """Makes the run folder, or goes on where its newest checkpoint stands; then opens the logs.

        Raises ConfigError when the folder holds a run of another configuration, DataError for a damaged checkpoint or
        where not all processes see the same one.
        """
        saved = checkpoints(self.folder / "checkpoints")
        if not self.world.agree([path.name for path in saved]):
            raise DataError(f"the processes see different files in {self.folder}: put run.root where all can read it")
        changes: list[str] = []
        if saved:
            changes = check_changes(load_resolved(self.folder / "config.yaml"), self.config, str(self.folder))
            self._restore(load_checkpoint(saved[-1]))
        attempt = this_attempt(self._attempts() + 1, self.world)
        if self.world.leads:
            self._open_logs(attempt, changes)
        self._settle_owed()
        if not saved:
            self.save()  # from the first moment on a killed run keeps its identity
        return self

    def _attempts(self) -> int:
        """How often the run has been started, by what is left of its files."""
        path = self.folder / METRICS
        records = read_metrics(path) if self.world.leads and path.exists() else []
        return max([self.status.last_attempt, *(r["attempt"]["number"] for r in records if "attempt" in r)])

    def _open_logs(self, attempt: Attempt, changes: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress = Progress(self.config.train.tokens)
        self.metrics = MetricsFile(self.folder / METRICS)
        self.metrics.truncate_after(self.step)
        self.metrics.append(self._here() | {"attempt": asdict(attempt)})
        self.status.begin(attempt, self.step, self.tokens)
        if changes:
            keep_changes(self.folder, attempt.number, self.step, changes)
            self.message("\n".join(["changed since the attempt before:", *(f"  {line}" for line in changes)]))
        save_resolved(self.config, self.folder / "config.yaml")
        plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self.config)))
        self.wandb = WandbLogger(self.config.wandb, self.folder, self.config.run.name, plain, self._wandb_id)
        self._wandb_id = self.wandb.run_id

    def _settle_owed(self) -> None:
        """An evaluation that an attempt since has made is not owed any longer."""
        if self.owed is None:
            return
        made = False
        if self.world.leads:
            made = any("eval" in record for record in read_metrics(self.metrics.path) if record["step"] == self.step)
        if self.world.from_first(made):
            self.owed = None

    def close(self) -> None:
        if not self.world.leads:
            return
        self.progress.close()
        self.metrics.close()
        self.wandb.finish()

    def next_batch(self, num_rows: int) -> tuple[Batch, int] | None:
        """This process's rows of the next batch of `num_rows`, and the tokens of all rows (pads are none).

        None where some process was asked to stop while it waited for data; then no process has gone on.
        """
        self.whereabouts.begin_step(self.step + 1)
        position = self.source.state_dict()
        try:
            batch = self.reading.batch(num_rows)
        except GivenUp:
            batch = None
        own = 0 if batch is None else int((batch.documents_BT != PAD).sum())
        tokens, given_up = self.world.sum(own, batch is None)
        if batch is None or given_up:
            self.source.load_state_dict(position)
            return None
        return batch, round(tokens / self.world.replica)

    def advance(self, batch: Batch, num_tokens: int, state: FastWeights) -> None:
        """One step is done: counts its tokens (pads are none) and keeps the memory of the rows that go on."""
        self.step += 1
        self.tokens += num_tokens
        self.carried = state if bool(batch.continues_B.any()) else None
        self.status.progress(self.step, self.tokens)

    def _here(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "time": time.time()}

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record to the metrics file, wandb and the progress line."""
        if not self.world.leads:
            return
        record = self._here() | record
        self.metrics.append(record)
        self.wandb.log(record, self.step)
        self.progress.update(record)

    def message(self, text: str) -> None:
        if self.world.leads:
            self.progress.message(text)

    def save(self) -> None:
        """Writes a checkpoint in one format for all layouts, unless that of this step is there."""
        if self._saved_step == self.step:
            return
        began = time.monotonic()
        self.whereabouts.begin(Phase.SAVING)
        trained, carried = self.engine.state_dict(), self.engine.whole_state(self.carried)
        if trained is not None:
            self._write_checkpoint(trained, carried)
        self._saved_step = self.step
        self.stopping.saved(time.monotonic() - began)

    def _write_checkpoint(self, trained: dict[str, Any], carried: FastWeights | None) -> None:
        self.metrics.sync()
        contents = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            **trained,
            "data": self.source.state_dict(),
            "carried": None if carried is None else carried.to_state_dict(),
            "rng": torch.get_rng_state(),
            "wandb_id": self._wandb_id,
            "owed_evaluation": None if self.owed is None else asdict(self.owed),
        }
        save_checkpoint(self.folder / "checkpoints", self.step, contents, self.config.train.keep_checkpoints)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step, self.tokens, self.skipped = saved["step"], saved["tokens"], saved["skipped"]
        self.engine.load_state_dict(saved)
        self.source.load_state_dict(saved["data"])
        if saved["carried"] is not None:
            self.carried = self.engine.own_state(FastWeights.from_state_dict(saved["carried"], self.model.num_layers))
        torch.set_rng_state(saved["rng"])
        self._wandb_id = saved["wandb_id"]
        if saved["owed_evaluation"] is not None:
            self.owed = StepShape(**saved["owed_evaluation"])
        self._saved_step = self.step


def _settle_vocabulary(config: Config, vocab_size: int) -> None:
    if config.model.vocab_size == 0:
        config.model.vocab_size = vocab_size
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the data's {vocab_size}; "
            "leave it 0 to take the data's"
        )
