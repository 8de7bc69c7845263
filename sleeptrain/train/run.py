"""A run: all that a training job holds, built from its configuration, saved to and restored from its folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from sleeptrain.checkpoint.find import newest_whole
from sleeptrain.checkpoint.fit import check_resume
from sleeptrain.checkpoint.folder import CONFIG, STATE, read_state, remove_leftovers, set_aside
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.saver import Saver
from sleeptrain.checkpoint.start import start_from
from sleeptrain.config import Config, config_diff, load_resolved, resolved_yaml, save_resolved
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.data.source import build_source
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.launch import shared_reading
from sleeptrain.parallel.world import World
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
    "sleep.recompute",
    "train.micro_batch",
    "train.log_every",
    "train.threads",
    "checkpoint.",
)
RNG = "rng/torch"


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
        self._resolved = resolved_yaml(config)
        self.reading = shared_reading(self.source, world)
        self.engine = build_engine(config, world, whereabouts)
        self.saver = Saver(self.folder / "checkpoints", world, config.checkpoint, self.message)
        self.step = self.tokens = self.samples = self.skipped = 0
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
        """Makes the run folder, or goes on where its newest whole checkpoint stands; then opens the logs.

        Raises ConfigError when the folder holds a run of another configuration, DataError where all checkpoints are
        damaged or do not fit, or not all processes see the same ones, CheckpointError where the first one of a new run
        cannot be written.
        """
        found = newest_whole(self.saver.folder, self.world)
        if found.whole is not None:
            self.world.together(partial(self._go_on, found.whole))
        elif self.config.run.init_from:
            start_from(self.config, self.engine, self.world)
        if self.world.leads:
            self._open_logs()
            self._clear_away(found.damaged)
        if found.whole is None:
            self.save()  # from the first moment on a killed run keeps its identity
            self.saver.finish()
        return self

    def _clear_away(self, damaged: Mapping[Path, str]) -> None:
        remove_leftovers(self.saver.folder)
        for path, damage in damaged.items():
            self.message(f"{path.name} is damaged ({damage}); set aside as {set_aside(path).name}")
        if damaged:
            self.message(f"going on from the checkpoint of step {self.step}")

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
        self.samples += batch.tokens_BT.shape[0] * self.world.part.ranks
        self.carried = state if bool(batch.continues_B.any()) else None
        self.saver.poll()

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record to the metrics file, wandb and the progress line."""
        if not self.world.leads:
            return
        record = {"step": self.step, "tokens": self.tokens, **record, "time": time.time()}
        failed_before = self.metrics.failed
        self.metrics.append(record)
        if self.metrics.failed and not failed_before:
            self.message(
                f"ALARM: {self.metrics.path} takes no records ({self.metrics.failed}); they are kept and retried"
            )
        self.wandb.log(record, self.step)
        self.progress.update(record)

    def message(self, text: str) -> None:
        if self.world.leads:
            self.progress.message(text)

    def save(self) -> None:
        """Begins to write a checkpoint, in one format for all layouts, unless that of this step is there."""
        self.whereabouts.begin(Phase.SAVING)
        self.saver.make_way(self.step)
        if self.saver.newest != self.step:
            tensors = self.engine.own_tensors(self.carried)
            documents = {STATE: json.dumps(self._state(), indent=1).encode(), CONFIG: self._resolved}
            if self.world.leads:
                tensors[RNG] = torch.get_rng_state()
            # Records first: a run that goes on from the checkpoint must find those of all steps before.
            self.saver.start(self.step, tensors, documents, lambda: self.metrics.sync())

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; rates and the curriculum are functions of the tokens."""
        mesh = self.world.mesh
        return {
            "step": self.step,
            "tokens": self.tokens,
            "samples": self.samples,
            "skipped": self.skipped,
            "data": self.source.state_dict(),
            "wandb_id": self._wandb_id,
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "written_by": {
                "tensor": mesh.tensor.size,
                "pipeline": mesh.pipeline.size,
                "data": mesh.data.size,
                "zero": self.config.parallel.zero,
            },
        }

    def _go_on(self, checkpoint: Path) -> None:
        """Each process reads for itself; where one cannot, none goes on."""
        _refuse_other_config(self.folder / "config.yaml", self.config)
        saved, files = read_state(checkpoint), TensorFiles(checkpoint)
        check_resume(files.forms, self.config.model)
        self.step, self.tokens, self.samples = saved["step"], saved["tokens"], saved["samples"]
        self.skipped, self._wandb_id = saved["skipped"], saved["wandb_id"]
        self.source.load_state_dict(saved["data"])
        self.carried = self.engine.load(files)
        files.read({RNG: torch.set_rng_state})
        self.saver.newest = self.step


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
