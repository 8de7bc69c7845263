"""A reader of the experiments of `configs/` without hydra. The search for the experiment nearest to a run reads all.

Hydra takes 0.3 s to compose an experiment, this reader 0.01 s. It supports the features that the files of `configs/`
use (a defaults list of overridden groups and of files in the same group). Hydra reads a file with any other feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

from yaml import YAMLError

from sleeptrain.config.compose import compose, config_dir
from sleeptrain.config.literal import read_yaml
from sleeptrain.config.schema import Config
from sleeptrain.config.strings import quote_yaml

GROUP, PACKAGE = "experiment", "# @package"
OVERRIDE = "override /"
# Entries of the defaults list in `config.yaml` that are no groups of settings.
NO_GROUPS = ("schema", "_self_")
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class _NeedsHydra(Exception):
    """A file uses a feature that this reader does not support."""


def experiment_names() -> list[str]:
    return sorted(path.stem for path in (config_dir() / GROUP).glob("*.yaml"))


@cache
def experiment_config(name: str) -> Config:
    """The result of `compose(["experiment=<name>"])`, but validated only if hydra is needed.

    Raises ConfigError if hydra is needed and refuses the experiment.
    """
    try:
        return _read_experiment(name)
    except (_NeedsHydra, OSError, YAMLError, TypeError, ValueError, RecursionError):
        return compose([f"{GROUP}={name}"])


def _read_experiment(name: str) -> Config:
    base = _file(config_dir() / "config.yaml", "")
    chosen: dict[str, str] = {}
    experiment = _chain(GROUP, name, chosen)
    settings = asdict(Config())
    for group, option in _base_groups(base):
        _merge(settings, {group: _chain(group, chosen.pop(group, option))})
    if chosen:
        raise _NeedsHydra
    _merge(settings, {key: value for key, value in base.items() if key not in ("defaults", "hydra")})
    _merge(settings, experiment)
    return cast(Config, _typed(Config, _resolve(settings, settings)))


def _resolve(value: Any, settings: Mapping[str, Any]) -> Any:
    """The value with each `${section.setting}`, which must be a whole value, replaced by that setting of `settings`."""
    if isinstance(value, dict):
        return {key: _resolve(item, settings) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, settings) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    match = REFERENCE.fullmatch(value)
    if match is None:
        raise _NeedsHydra
    found: Any = settings
    for key in match[1].split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise _NeedsHydra
        found = found[key]
    return _resolve(deepcopy(found), settings)


def _base_groups(base: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The groups that every run has, in order, and the option of each."""
    entries = [entry for entry in base["defaults"] if entry not in NO_GROUPS]
    options = [pair for entry in entries for pair in entry.items() if not pair[0].startswith("override hydra/")]
    if (GROUP, None) not in options or any(option is None for group, option in options if group != GROUP):
        raise _NeedsHydra
    return [(group, option) for group, option in options if group != GROUP]


def _chain(group: str, option: str, chosen: dict[str, str] | None = None) -> dict[str, Any]:
    """The settings of a file, merged with those of the files in its defaults list, in the order of that list.

    chosen: receives the options that the files choose for other groups; the outermost file wins. None: the files may
    not choose any.
    """
    content = dict(_file(config_dir() / group / f"{option}.yaml", "" if group == GROUP else group))
    defaults = content.pop("defaults", [])
    for entry in defaults:
        if not isinstance(entry, dict):
            continue
        for key, value in entry.items():
            if chosen is None or not key.startswith(OVERRIDE) or not isinstance(value, str):
                raise _NeedsHydra
            chosen.setdefault(key.removeprefix(OVERRIDE), value)
    merged: dict[str, Any] = {}
    files = [entry for entry in defaults if isinstance(entry, str)]
    for entry in files if "_self_" in files else [*files, "_self_"]:
        _merge(merged, content if entry == "_self_" else _chain(group, entry, chosen))
    return merged


@cache
def _file(path: Path, package: str) -> Mapping[str, Any]:
    """The content of a file. package: the section of the configuration that receives its settings."""
    text = path.read_text(encoding="utf-8")
    headers = [line.removeprefix(PACKAGE).strip() for line in text.splitlines() if line.startswith(PACKAGE)]
    # Hydra needs the header of an experiment; in a group the header can only repeat the default.
    if headers != ["_global_"] if path.parent.name == GROUP else headers not in ([], [package]):
        raise _NeedsHydra
    content = read_yaml(quote_yaml(text, package).encode())
    if not isinstance(content, dict):
        raise _NeedsHydra
    return content


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Merge as OmegaConf does: mappings entry by entry, any other value replaces the old one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)


def _typed(kind: Any, value: Any) -> Any:
    """Convert a plain value to the type of its setting. Raises TypeError for an unknown setting."""
    kind = next((arg for arg in get_args(kind) if arg is not NoneType), kind) if NoneType in get_args(kind) else kind
    if is_dataclass(kind) and isinstance(value, dict):
        kinds = _field_types(cast(type, kind))
        return cast(Any, kind)(**{name: _typed(kinds.get(name), item) for name, item in value.items()})
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(get_args(kind)[0], item) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _typed(get_args(kind)[1], item) for key, item in value.items()}
    return float(value) if kind is float and type(value) is int else value


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
