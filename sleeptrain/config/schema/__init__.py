"""The typed configuration: a dataclass for each concept, composed by hydra from `configs/`, checked by `validate`.

Every field is a setting that a user may override on the command line by its dotted path (`sleep.passes=4`), and is
declared once, by `sleeptrain.config.setting.setting`. A run saves its `Config` in `<run folder>/config.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sleeptrain.config.schema.data import (
    DataConfig,
    DepoConfig,
    GsmInfiniteConfig,
    MixtureStage,
    Rule110Config,
    ShardsConfig,
    ShardSource,
)
from sleeptrain.config.schema.model import AttentionConfig, GatedDeltaNetConfig, JetConfig, Mamba2Config, ModelConfig
from sleeptrain.config.schema.optim import FrozenStage, OptimConfig, Rate
from sleeptrain.config.schema.run import (
    CheckpointConfig,
    HealthConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)
from sleeptrain.config.schema.sleep import CurriculumStage, SleepConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "CurriculumStage",
    "DataConfig",
    "DepoConfig",
    "FrozenStage",
    "GatedDeltaNetConfig",
    "GsmInfiniteConfig",
    "HealthConfig",
    "JetConfig",
    "Mamba2Config",
    "MixtureStage",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Rate",
    "Rule110Config",
    "RunConfig",
    "ShardSource",
    "ShardsConfig",
    "SleepConfig",
    "TrainConfig",
    "WandbConfig",
]


@dataclass
class Config:
    """The settings of a run, a dataclass for each section; docs/configuration.md lists every one."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sleep: SleepConfig = field(default_factory=SleepConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
