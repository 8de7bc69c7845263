"""A run: all that a training job holds, built from its configuration, saved to and restored from its folder."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from sleeptrain.config import Config, config_diff, load_resolved, save_resolved
from sleeptrain.data.batch import Batch
from sleeptrain.data.source import build_source
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sleeptrain.train.metrics import MetricsFile
from sleeptrain.train.optim import Optimizers
from sleeptrain.train.progress import Progress
from sleeptrain.train.roles import parameter_roles
from sleeptrain.train.wandb_log import WandbLogger

# Settings that a run may change when it goes on: they touch neither its data nor its mathematics.
FREE_SETTINGS = (
    "run.",
    "wandb.",
    "data.shards.on_damage",
    "data.shards.workers",
    "data.shards.cache",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.threads",
)


class Run:
    """Model, optimizers, data, position and logs of one job. Building it reads data; only `open` writes anything."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.run.root) / config.run.name
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.device = _device(config.train.device)
        self.source = build_source(config.data)
        _settle_vocabulary(config, self.source.vocab_size)
        self.model = Hybrid(config.model)
        self.model.init_weights(config.train.seed)
        self.model.to(self.device)
        self.optim = Optimizers(parameter_roles(self.model), dict(self.model.named_parameters()), config.optim)
        self.step = self.tokens = self.skipped = 0
        self.carried: FastWeights | None = None
        self._wandb_id: str | None = None

    @property
    def done(self) -> bool:
        return self.tokens >= self.config.train.tokens

    def open(self) -> Run:
        """Makes the run folder, or goes on where its newest checkpoint stands; then opens the logs.

        Raises ConfigError when the folder holds a run of another configuration, DataError for a damaged checkpoint.
        """
        saved = checkpoints(self.folder / "checkpoints")
        if saved:
            _refuse_other_config(self.folder / "config.yaml", self.config)
            self._restore(load_checkpoint(saved[-1]))
        self.folder.mkdir(parents=True, exist_ok=True)
        save_resolved(self.config, self.folder / "config.yaml")
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        self.metrics.truncate_after(self.step)
        plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(self.config)))
        self.wandb = WandbLogger(self.config.wandb, self.folder, self.config.run.name, plain, self._wandb_id)
        self._wandb_id = self.wandb.run_id
        self.progress = Progress(self.config.train.tokens)
        if not saved:
            self.save()  # from the first moment on a killed run keeps its identity
        return self

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
        self.wandb.finish()

    def advance(self, batch: Batch, num_tokens: int, state: FastWeights) -> None:
        """One step is done: counts its tokens (pads are none) and keeps the memory of the rows that go on."""
        self.step += 1
        self.tokens += num_tokens
        self.carried = state if bool(batch.continues_B.any()) else None

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record to the metrics file, wandb and the progress line."""
        record = {"step": self.step, "tokens": self.tokens, **record, "time": time.time()}
        self.metrics.append(record)
        self.wandb.log(record, self.step)
        self.progress.update(record)

    def save(self) -> None:
        self.metrics.sync()
        carried = None if self.carried is None else self.carried.to("cpu").to_state_dict()
        contents = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "model": self.model.state_dict(),
            "optim": self.optim.state_dict(),
            "data": self.source.state_dict(),
            "carried": carried,
            "rng": torch.get_rng_state(),
            "wandb_id": self._wandb_id,
        }
        save_checkpoint(self.folder / "checkpoints", self.step, contents, self.config.train.keep_checkpoints)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step, self.tokens, self.skipped = saved["step"], saved["tokens"], saved["skipped"]
        self.model.load_state_dict(saved["model"])
        self.optim.load_state_dict(saved["optim"])
        self.source.load_state_dict(saved["data"])
        if saved["carried"] is not None:
            self.carried = FastWeights.from_state_dict(saved["carried"], self.model.num_layers).to(self.device)
        torch.set_rng_state(saved["rng"])
        self._wandb_id = saved["wandb_id"]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device; use train.device=auto or cpu")
    return torch.device(name)


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
