"""Which settings may change when a run resumes: some freely, others if `run.allow_changes` names them, some never."""

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
    """Whether a setting, or an item of one (`model.layers[1]`), may change when a run resumes."""
    return _ON_RESUME.get(name.partition("[")[0], "named")


_ON_RESUME: dict[str, OnResume] = {name: declared.on_resume for name, _, declared in declared_settings(Config)}


def check_allowed(names: Iterable[str], config: Config) -> None:
    """Raises ConfigError for a name in `run.allow_changes` that is no setting, or a setting that can never change."""
    known = [name for name, _ in settings(config)]
    for name in names:
        if name not in known:
            members = [other for other in known if other.startswith(f"{name}.")]
            way_out = f"it has {', '.join(members)}: name them" if members else suggest_setting(name, Config)
            raise ConfigError(f"run.allow_changes: '{name}' is no setting; {way_out}")
        if on_resume(name) == "fixed":
            raise ConfigError(
                f"run.allow_changes: {name} cannot change in a run, because the content of a checkpoint depends on "
                "it; choose another run.name"
            )


def check_changes(old: Config, new: Config, folder: str) -> list[str]:
    """The changed settings of a run that resumes, as lines (`optim.muon_lr: 0.002 -> 0.01`), without `run.*`.

    folder: the run folder, for the message. Raises ConfigError, with the refused changes as its details, if a change is
    neither free nor named in `run.allow_changes`.
    """
    lines = [line for line in config_diff(without_places(old), without_places(new)) if not line.startswith("run.")]
    allowed = tuple(f"{name}:" for name in new.run.allow_changes)
    refused = [line for line in lines if not line.startswith(allowed) and on_resume(_name(line)) != "free"]
    if refused:
        raise ConfigError(f"{folder} holds a run with other settings; {_way_out(refused)}", refused)
    return lines


def check_same_run(saved: Config, new: Config, checkpoint: str) -> None:
    """Raises ConfigError if the settings saved in a checkpoint differ in a setting that never changes in a run."""
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
    return f"{again}; to change them from here on, add {added}" if added else again


def consent(refused: Sequence[str]) -> str | None:
    """The override that allows the changes in these lines of `config_diff`; None if one of the settings is fixed."""
    names = [_name(line) for line in refused]
    return None if any(on_resume(name) == "fixed" for name in names) else f"'run.allow_changes=[{','.join(names)}]'"


def _name(line: str) -> str:
    """The setting's name in a line of `config_diff`."""
    return line.partition(":")[0]


def without_places(config: Config) -> Config:
    """A copy of the settings without the data's folders. Data may move; the saved position identifies its content."""
    config = deepcopy(config)
    for source in config.data.shards.sources:
        source.train = source.validation = ""
    config.data.shards.tokenizer = ""
    return config
