"""The command that repeats a run: the experiment that is nearest to its configuration, and what differs from it."""

from __future__ import annotations

import re
import shlex
from dataclasses import is_dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

from sleeptrain.config.compose import compose, config_dir
from sleeptrain.config.literal import escaped
from sleeptrain.config.ranges import settings
from sleeptrain.config.resolved import config_diff
from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.report.groups import told

PLAIN = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
QUOTED = re.compile(r'(\\*)("|$)')  # where hydra reads backslashes in a quoted text as more than that


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
    return shlex.join(["sleeptrain", "train", *overrides])


def _candidates(config: Config) -> list[str]:
    """The experiment that the run's name tells, else all of the same kind of data."""
    names = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
    named = [part for part in PurePath(config.run.name).parts if part in names]
    return named[:1] or [name for name in names if _experiment(name).data.source == config.data.source]


@cache
def _experiment(name: str) -> Config:
    return compose([f"experiment={name}"])


def _overrides(name: str, config: Config) -> list[str]:
    before = dict(settings(_experiment(name)))
    changed = [(key, value) for key, value in settings(config) if before[key] != value]
    return [f"experiment={name}", *(f"{key}={_written(value)}" for key, value in changed)]


def _written(value: Any) -> str:
    """A value in the grammar of hydra's overrides; no `${...}` in it is looked up when they are composed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if is_dataclass(value):
        value = told(value)
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(v)}' for key, v in value.items())}}}"
    if isinstance(value, str) and not (PLAIN.fullmatch(value) and value not in ("null", "true", "false", "nan", "inf")):
        return f'"{QUOTED.sub(_doubled, escaped(value))}"'
    return str(value)


def _doubled(found: re.Match[str]) -> str:
    return 2 * found[1] + ('\\"' if found[2] else "")
