"""The command that repeats a run: the experiment that is nearest to its configuration, and what differs from it."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import PurePath
from typing import Any

from sleeptrain.config.compose import compose
from sleeptrain.config.experiments import experiment_config, experiment_names
from sleeptrain.config.overrides import override, shell_command
from sleeptrain.config.ranges import settings
from sleeptrain.config.resolved import config_diff
from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.report.groups import told


def repeat_command(config: Config) -> str | None:
    """`sleeptrain train experiment=... setting=value ...`, which composes to `config`; None where none does.

    Of experiments that are equally near, the first by name.
    """
    overrides = min((_overrides(name, config) for name in _candidates(config)), key=len, default=None)
    if overrides is None:
        return None
    try:
        if config_diff(compose(overrides), config):
            return None
    except ConfigError:
        return None
    return shell_command("sleeptrain", "train", *overrides)


def _candidates(config: Config) -> list[str]:
    """The experiment that the run's name tells, else all of the same kind of data."""
    names = experiment_names()
    named = [part for part in PurePath(config.run.name).parts if part in names]
    return named[:1] or [name for name in names if experiment_config(name).data.source == config.data.source]


def _overrides(name: str, config: Config) -> list[str]:
    before = dict(settings(experiment_config(name)))
    changed = [(key, value) for key, value in settings(config) if before[key] != value]
    return [f"experiment={name}", *(override(key, _plain(value)) for key, value in changed)]


def _plain(value: Any) -> Any:
    """The value with only those fields of dataclasses that differ from their defaults."""
    if isinstance(value, list):
        return list(map(_plain, value))
    return {key: _plain(v) for key, v in told(value).items()} if is_dataclass(value) else value
