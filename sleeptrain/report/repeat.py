"""The command that repeats a run: the experiment nearest to its configuration, and the settings that differ."""

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
from sleeptrain.report.groups import non_defaults


def repeat_command(config: Config) -> str | None:
    """The command `sleeptrain train experiment=... setting=value ...` that composes to `config`; None if there is none.

    It has the experiment that needs the fewest overrides; of several, the first by name.
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
    """The experiment in the run's name; without one, all experiments with the same data source."""
    names = experiment_names()
    named = [part for part in PurePath(config.run.name).parts if part in names]
    return named[:1] or [name for name in names if experiment_config(name).data.source == config.data.source]


def _overrides(name: str, config: Config) -> list[str]:
    defaults = dict(settings(experiment_config(name)))
    differing = [(key, value) for key, value in settings(config) if defaults[key] != value]
    return [f"experiment={name}", *(override(key, _plain(value)) for key, value in differing)]


def _plain(value: Any) -> Any:
    """The value, with dataclasses as dictionaries of their fields without defaults."""
    if isinstance(value, list):
        return list(map(_plain, value))
    return {key: _plain(v) for key, v in non_defaults(value).items()} if is_dataclass(value) else value
