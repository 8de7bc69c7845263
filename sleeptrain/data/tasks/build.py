"""The task that `data.source` names."""

from __future__ import annotations

from sleeptrain.config.schema import DataConfig
from sleeptrain.data.tasks.depo import Depo
from sleeptrain.data.tasks.gsm_infinite.task import GsmInfinite
from sleeptrain.data.tasks.rule110 import Rule110
from sleeptrain.data.tasks.task import Task
from sleeptrain.errors import ConfigError


def build_task(config: DataConfig) -> Task:
    """Build the task. Raises ConfigError for a source that is no task, and the errors of the task."""
    if config.source == "rule110":
        return Rule110(config.rule110)
    if config.source == "depo":
        return Depo(config.depo)
    if config.source == "gsm_infinite":
        return GsmInfinite(config.gsm_infinite)
    raise ConfigError(f"data.source={config.source!r} is unknown: set shards, rule110, depo or gsm_infinite")
