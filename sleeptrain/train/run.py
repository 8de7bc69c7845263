"""A run: all that a training job holds, built from its configuration, saved to and restored from its folder."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from sleeptrain.config import Config, config_diff, load_resolved, save_resolved
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.source import build_source
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.launch import shared_reading
from sleeptrain.parallel.world import World
from sleeptrain.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sleeptrain.train.engine import build_engine
from sleeptrain.train.metrics import MetricsFile
from sleeptrain.train.progress import Progress
from sleeptrain.train.wandb_log import WandbLogger
from sleeptrain.watch.whereabouts import Phase, Whereabouts

# Settings that a run may change when it goes on: they touch neither its data nor its mathematics.
FREE_SETTINGS = (
    "run.",
    "parallel.",
    "health.",
    "wandb.",
    "data.shards.on_damage",
    "data.shards.workers",
    "data.shards.cache",
    "train.micro_batch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.threads",
)


class Run:
    """Model, optimizers, data, position and logs of one job; in each of its processes, this one's part of them.

    world: the processes, which have met. whereabouts: of this one, kept current. Building it reads data; only `open`
    writes anything, and only where `world.leads`.
    """

    def __init__(self, config: Config, world: World, whereabouts: Whereabouts):
        self.config, self.world, self.whereabouts = config, world, whereabouts
        self.folder = Path(config.run.root) / config.run.name
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.source = build_source(config.data, world.part)
        _settle_vocabulary(config, self.source.vocab_size)
        self.reading = shared_reading(self.source, world)
        self.engine = build_engine(config, world, whereabouts)
        self.step = self.tokens = self.skipped = 0
        self.carried: FastWeights | None = None
        self._wandb_id: str | None = None

    @property
    def model(self) -> Hybrid:
        return self.engine.model

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def done(self) -> bool:
        return self.tokens >= self.config.train.tokens

    def open(self) -> Run:
        """Makes the run folder, or goes on where its newest checkpoint stands; then opens the logs.

        Raises ConfigError when the folder holds a run of another configuration, DataError for a damaged checkpoint or
        where not all processes see the same one.
        """
        saved = checkpoints(self.folder / "checkpoints")
        if not self.world.agree([path.name for path in saved]):
            raise DataError(f"the processes see different files in {self.folder}: put run.root where all can read it")
        if saved:
            _refuse_other_config(self.folder / "config.yaml", self.config)
            self._restore(load_checkpoint(saved[-1]))
        if self.world.leads:
            self._open_logs()
        if not saved:
            self.save()  # from the first moment on a killed run keeps its identity
        return self

    def _open_logs(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_resolved(self.config, self.folder / "config.yaml")
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        self.metrics.truncate_after(self.step)
        plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self.config)))
        self.wandb = WandbLogger(self.config.wandb, self.folder, self.config.run.name, plain, self._wandb_id)
        self._wandb_id = self.wandb.run_id
        self.progress = Progress(self.config.train.tokens)

    def close(self) -> None:
        if not self.world.leads:
            return
        self.progress.close()
        self.metrics.close()
        self.wandb.finish()

    def next_batch(self, num_rows: int) -> tuple[Batch, int]:
        """This process's rows of the next batch of `num_rows`, and the tokens of all rows (pads are none)."""
        self.whereabouts.begin_step(self.step + 1)
        batch = self.reading.batch(num_rows)
        own = int((batch.documents_BT != PAD).sum())
        return batch, round(self.world.sum(own)[0] / self.world.replica)

    def advance(self, batch: Batch, num_tokens: int, state: FastWeights) -> None:
        """One step is done: counts its tokens (pads are none) and keeps the memory of the rows that go on."""
        self.step += 1
        self.tokens += num_tokens
        self.carried = state if bool(batch.continues_B.any()) else None

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record to the metrics file, wandb and the progress line."""
        if not self.world.leads:
            return
        record = {"step": self.step, "tokens": self.tokens, **record, "time": time.time()}
        self.metrics.append(record)
        self.wandb.log(record, self.step)
        self.progress.update(record)

    def message(self, text: str) -> None:
        if self.world.leads:
            self.progress.message(text)

    def save(self) -> None:
        """Writes a checkpoint in one format for all layouts."""
        self.whereabouts.begin(Phase.SAVING)
        trained, carried = self.engine.state_dict(), self.engine.whole_state(self.carried)
        if trained is None:
            return
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


def _settle_vocabulary(config: Config, vocab_size: int) -> None:
    if config.model.vocab_size == 0:
        config.model.vocab_size = vocab_size
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the data's {vocab_size}; "
            "leave it 0 to take the data's"
        )


def _refuse_other_config(path: Path, config: Config) -> None:
    lines = config_diff(_without_places(load_resolved(path)), _without_places(config))
    changed = [line for line in lines if not line.startswith(FREE_SETTINGS)]
    if changed:
        raise ConfigError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}); "
            "choose another run.name, or the same settings to go on"
        )


def _without_places(config: Config) -> Config:
    """Data may move from one folder to another: what it is, the saved position knows."""
    config = deepcopy(config)
    for source in config.data.shards.sources:
        source.train = source.validation = ""
    config.data.shards.tokenizer = ""
    return config
