"""Checkpoints of small models, and their settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.write import write
from sleeptrain.config import resolved_yaml
from sleeptrain.config.mixers import recurrent_names
from sleeptrain.config.schema import (
    Config,
    CurriculumStage,
    DataConfig,
    ModelConfig,
    RunConfig,
    ShardsConfig,
    ShardSource,
    SleepConfig,
    TrainConfig,
)
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import stage_shape
from tests.checkpoint.worlds import all_or_raise, alone, nothing

STATE = {"step": 12, "tokens": 3456}


def run_config(model: ModelConfig, tokenizer: str = "") -> Config:
    """The settings of a run with N=3 and L=16 at the tokens of STATE, or N=1 for a model without memory."""
    data = DataConfig("shards", shards=ShardsConfig(tokenizer, [ShardSource("books"), ShardSource("code")]))
    if not tokenizer:
        data.source = "rule110"
    curriculum = [CurriculumStage(1000, passes=3, window=16), CurriculumStage(5000, passes=4)]
    if not set(model.layers) & set(recurrent_names()):
        curriculum = [CurriculumStage(1000, window=16)]
    sleep = SleepConfig(feedback="none", core=[0, 2], curriculum=curriculum)
    return Config(RunConfig(name="small"), model, sleep, data, train=TrainConfig(tokens=10_000))


def stopping_config(model: ModelConfig, tokenizer: str = "", **sleep: Any) -> Config:
    """`run_config` with N=4, L=4 and a stop rule, `change` unless `sleep` has another."""
    config = run_config(model, tokenizer)
    rule = {"passes": 4, "window": 4, "stop": "change", "stop_threshold": 0.5, "min_passes": 2} | sleep
    config.sleep = SleepConfig(**rule)
    return config


def documents_of(config: Config, **more: Any) -> dict[str, bytes]:
    state = STATE | more | {"shape": asdict(stage_shape(config, STATE["tokens"]))}
    return {"state.json": json.dumps(state).encode(), "config.yaml": resolved_yaml(config)}


def save_checkpoint(folder: Path, model: Hybrid, config: Config | None = None, **state: Any) -> Path:
    """Writes a checkpoint as a run does, with optimizer state. state: more fields of `state.json`."""
    config = config or run_config(model.config)
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {"optim/adamw/norm.weight/step": torch.tensor(12.0), "rng/torch": torch.get_rng_state()}
    write(folder, tensors, documents_of(config, **state), alone(), nothing)
    return folder


def save_half(folder: Path, model: Hybrid) -> None:
    """Writes the part of one of two ranks, which owns every second tensor."""
    world = all_or_raise()
    owned = list(model.named_parameters())[world.rank :: 2]
    documents = documents_of(run_config(model.config))
    write(folder, {f"model/{name}": p.detach() for name, p in owned}, documents, world, nothing)


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights, by parameter."""
    files = TensorFiles(checkpoint)
    return {name.removeprefix("model/"): files.tensor(name) for name in files.forms if name.startswith("model/")}
