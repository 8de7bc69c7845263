"""The resolved configuration of a run as a file, and the differences between two configurations."""

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
from sleeptrain.remote import Location
from sleeptrain.small_files import YAML_BYTES, read_bounded
from sleeptrain.terminal import hide_credentials


def run_folder(config: Config) -> Path:
    """The folder that holds all files of a run."""
    return Path(config.run.root) / config.run.name


def save_resolved(config: Config, path: str | Path) -> None:
    """Write `config` as YAML, whole or not at all; `load_resolved` reads the same values back."""
    write_whole(Path(path), resolved_yaml(config))


def resolved_yaml(config: Config) -> bytes:
    """The content of the file that `save_resolved` writes."""
    return write_yaml(asdict(config))


def load_resolved(path: str | Location) -> Config:
    """Read a file of `save_resolved`. A `${...}` in it is text, because the file need not be trusted.

    Raises ConfigError: not YAML, an unknown setting, a value of a wrong type.
    """
    try:
        content = read_bounded(Path(path) if isinstance(path, str) else path, YAML_BYTES)
        values = read_yaml(quote_yaml(content.decode()).encode())
        if not isinstance(values, dict):
            raise ValueError("it holds no settings by name")
        return literal(Config, values)
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
    """The settings as plain values that may be shown to others: without users and passwords in the sources' URLs."""
    values = asdict(config)
    for source in values["data"]["shards"]["sources"]:
        source |= {name: hide_credentials(source[name]) for name in SECRET}
    return values
