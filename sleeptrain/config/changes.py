"""What may change when a run goes on: some settings freely, others where they are named, some never."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy

from sleeptrain.config.ranges import settings
from sleeptrain.config.resolved import config_diff
from sleeptrain.config.schema import Config
from sleeptrain.config.setting import OnResume, declared_settings
from sleeptrain.config.suggest import suggest_setting
from sleeptrain.errors import ConfigError


def on_resume(name: str) -> OnResume:
    """Whether a setting, or an item of one (`model.layers[1]`), may change when a run goes on."""
    return _ON_RESUME.get(name.partition("[")[0], "named")


_ON_RESUME: dict[str, OnResume] = {name: declared.on_resume for name, _, declared in declared_settings(Config)}


def check_allowed(names: Iterable[str], config: Config) -> None:
    """Raises ConfigError for a name of `run.allow_changes` that is no setting, or one that cannot change."""
    known = [name for name, _ in settings(config)]
    for name in names:
        if name not in known:
            inside = [other for other in known if other.startswith(f"{name}.")]
            way_out = f"it has {', '.join(inside)}: name them" if inside else suggest_setting(name, Config)
            raise ConfigError(f"run.allow_changes: '{name}' is no setting; {way_out}")
        if on_resume(name) == "fixed":
            raise ConfigError(
                f"run.allow_changes: {name} cannot change in a run, for what a checkpoint holds depends on it; "
                "choose another run.name"
            )


def check_changes(old: Config, new: Config, folder: str) -> list[str]:
    """The changes (`optim.muon_lr: 0.002 -> 0.01`) of a run that goes on, `run.*` left out.

    folder: of the run, for the message. Raises ConfigError, with the changes as its details, where one is neither free
    nor named in `run.allow_changes`.
    """
    lines = [line for line in config_diff(without_places(old), without_places(new)) if not line.startswith("run.")]
    allowed = tuple(f"{name}:" for name in new.run.allow_changes)
    refused = [line for line in lines if not line.startswith(allowed) and on_resume(_name(line)) != "free"]
    if refused:
        raise ConfigError(f"{folder} holds a run with other settings; {_way_out(refused)}", refused)
    return lines


def check_same_run(saved: Config, new: Config, checkpoint: str) -> None:
    """Raises ConfigError where a checkpoint's own settings differ in what never changes in a run."""
    lines = config_diff(without_places(saved), without_places(new))
    lines = [line for line in lines if on_resume(_name(line)) == "fixed"]
    if lines:
        raise ConfigError(
            f"{checkpoint} is a checkpoint of a run with other settings; choose another run.name, or the settings that "
            "it was made with",
            lines,
        )


def _way_out(refused: Sequence[str]) -> str:
    again, added = "choose another run.name, or the same settings to go on", consent(refused)
    return f"{again}; if they shall change from here on, add {added}" if added else again


def consent(refused: Sequence[str]) -> str | None:
    """What to write so that the settings at the head of these lines may change; None where one of them never can."""
    names = [_name(line) for line in refused]
    return None if any(on_resume(name) == "fixed" for name in names) else f"'run.allow_changes=[{','.join(names)}]'"


def _name(line: str) -> str:
    """Of the setting in a line of `config_diff`."""
    return line.partition(":")[0]


def without_places(config: Config) -> Config:
    """Data may move from one folder to another: what it is, the saved position knows."""
    config = deepcopy(config)
    for source in config.data.shards.sources:
        source.train = source.validation = ""
    config.data.shards.tokenizer = ""
    return config
