"""What a run was: its resolved configuration as a file, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sleeptrain.config.ranges import settings
from sleeptrain.config.schema import Config
from sleeptrain.config.strings import load_yaml
from sleeptrain.errors import ConfigError
from sleeptrain.files import write_whole


def run_folder(config: Config) -> Path:
    """Where everything of a run is kept."""
    return Path(config.run.root) / config.run.name


def save_resolved(config: Config, path: str | Path) -> None:
    """Write `config` as YAML, whole or not at all; `load_resolved` reads the same values back."""
    write_whole(Path(path), resolved_yaml(config))


def resolved_yaml(config: Config) -> bytes:
    """The file that `save_resolved` writes."""
    return OmegaConf.to_yaml(OmegaConf.structured(config)).encode()


def load_resolved(path: str | Path) -> Config:
    """Read what `save_resolved` wrote. ConfigError: not YAML, an unknown setting, a value of a wrong type."""
    try:
        written = load_yaml(path)
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), written)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a configuration of this version of sleeptrain: {reason}") from error


def config_diff(old: Config, new: Config) -> list[str]:
    """The settings in which two configurations differ, one line each: `sleep.passes: 1 -> 4`."""
    before, after = dict(settings(old)), dict(settings(new))
    return [f"{name}: {before[name]} -> {value}" for name, value in after.items() if before[name] != value]
