"""What a run was: its resolved configuration as a file, and how two of them differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sleeptrain.config.environment import SECRET
from sleeptrain.config.literal import literal, read_yaml, write_yaml
from sleeptrain.config.ranges import settings
from sleeptrain.config.schema import Config
from sleeptrain.config.strings import quote_yaml
from sleeptrain.errors import ConfigError
from sleeptrain.files import write_whole
from sleeptrain.small_files import YAML_BYTES, read_bounded
from sleeptrain.terminal import hide_credentials


def run_folder(config: Config) -> Path:
    """Where everything of a run is kept."""
    return Path(config.run.root) / config.run.name


def save_resolved(config: Config, path: str | Path) -> None:
    """Write `config` as YAML, whole or not at all; `load_resolved` reads the same values back."""
    write_whole(Path(path), resolved_yaml(config))


def resolved_yaml(config: Config) -> bytes:
    """The file that `save_resolved` writes."""
    return write_yaml(asdict(config))


def load_resolved(path: str | Path) -> Config:
    """Read what `save_resolved` wrote, as data: a `${...}` in it is text, for the file may be somebody else's.

    ConfigError: not YAML, an unknown setting, a value of a wrong type.
    """
    try:
        written = read_yaml(quote_yaml(read_bounded(Path(path), YAML_BYTES).decode()).encode())
        if not isinstance(written, dict):
            raise ValueError("it holds no settings by name")
        return literal(Config, written)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a configuration of this version of sleeptrain: {reason}") from error


def config_diff(old: Config, new: Config) -> list[str]:
    """The settings in which two configurations differ, one line each: `sleep.passes: 1 -> 4`."""
    before, after = dict(settings(old)), dict(settings(new))
    return [f"{name}: {before[name]} -> {value}" for name, value in after.items() if before[name] != value]


def shareable(config: Config) -> dict[str, Any]:
    """The settings as plain values for whoever watches a run: no URL of a source has a user or a password in it."""
    values = asdict(config)
    for source in values["data"]["shards"]["sources"]:
        source |= {name: hide_credentials(source[name]) for name in SECRET}
    return values
