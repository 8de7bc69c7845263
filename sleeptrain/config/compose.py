"""Composition: hydra merges the groups of `configs/` and the overrides into the typed schema.

`compose([...])` returns the configuration of one run. In the console command hydra composes, and `resolve_job` finishes
its work. `validate_sweep` checks all jobs of a sweep before the first one starts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sleeptrain.config.changes import check_allowed
from sleeptrain.config.environment import keep_variables
from sleeptrain.config.explain import COMPOSITION_ERRORS, explain
from sleeptrain.config.literal import literal
from sleeptrain.config.schema import Config
from sleeptrain.config.strings import quote_override, register_source
from sleeptrain.config.validate import refuse_missing, validate
from sleeptrain.errors import ConfigError

HYDRA_VERSION = "1.3"


def config_dir() -> Path:
    """The folder of the configuration groups: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def register_schema() -> None:
    """Tell hydra about the dataclasses that `configs/config.yaml` composes over. May be called again."""
    if "schema.yaml" not in ConfigStore.instance().repo:
        ConfigStore.instance().store(name="schema", node=Config)
        register_source()


def compose(overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of one run, from overrides as on the command line: `["experiment=rule110"]`.

    Raises ConfigError.
    """
    overrides = [quote_override(override) for override in overrides]
    with _hydra(overrides):
        composed = _composed(overrides)
    return resolve(composed)


def validate_sweep(overrides: Sequence[str]) -> list[Path]:
    """Compose and validate every job of a sweep (`sleep.passes=1,2,4`). Returns the folders of its runs, each once.

    Raises ConfigError, also if two jobs would share a run folder.
    """
    overrides = [quote_override(override) for override in overrides]
    owners: dict[tuple[str, str], str] = {}
    roots: dict[Path, None] = {}
    same = _same_in_all_jobs(overrides)
    for job in _sweep_jobs(overrides):
        words = " ".join(word for word in job if not word.startswith("hydra."))
        config, root = _compose_sweep_job(job, same)
        roots[root] = None
        folder = (config.run.root, config.run.name)
        if folder in owners:
            raise ConfigError(
                f"run.name={config.run.name} would name the run folder of two jobs of the sweep ({owners[folder]} | "
                f"{words}): give each its own, or leave run.name to the experiments"
            )
        owners[folder] = words
    return list(roots)


def name_by_sweep(overrides: Sequence[str]) -> list[str]:
    """Overrides for hydra that name the jobs of a sweep after the settings that differ between them."""
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(_same_in_all_jobs(overrides))}]"]


def _same_in_all_jobs(overrides: Sequence[str]) -> list[str]:
    """The settings that do not tell a job of the sweep from the others, or are in the run's folder already."""
    with _hydra(overrides):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    same = [o.key_or_group for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()]
    return list(dict.fromkeys(["experiment", "run.name", "run.root", *same]))


def _sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    with _hydra(overrides):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        [jobs] = BasicSweeper.split_arguments(parser.parse_overrides(list(overrides)), max_batch_size=None)
        return jobs


def _compose_sweep_job(job: Sequence[str], same: list[str]) -> tuple[Config, Path]:
    """(the job's configuration, the folder that holds the runs of this job and of the jobs with the same run.name)."""
    with _hydra(job):
        composed = _composed(list(job))
        parsed = OverridesParser.create().parse_overrides(list(job))
    own = [o for o in parsed if not o.is_hydra_override()]
    config = resolve(composed, get_overrides_dirname(own, kv_sep="=", item_sep=",", exclude_keys=same))
    return config, Path(config.run.root) / sweep_run_name(composed.run.name, "")


def _composed(overrides: list[str]) -> DictConfig:
    """What hydra composes, without its own section. Files are merged once for each choice of files."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(o.is_hydra_override() or o.is_sweep_override() for o in parsed):
        return hydra_compose("config", overrides=overrides)
    loader = cast(ConfigLoaderImpl, GlobalHydra.instance().config_loader())
    choices = [o for o in parsed if loader.repository.group_exists(o.key_or_group) and not isinstance(o.value(), dict)]
    composed = deepcopy(_merge_files(tuple(str(o.input_line) for o in choices)))
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in choices], composed)
    return composed


@lru_cache(maxsize=64)
def _merge_files(choices: tuple[str, ...]) -> DictConfig:
    """The composition of the groups' files. choices: overrides that choose files, `experiment=rule110`."""
    return hydra_compose("config", overrides=list(choices))


@contextmanager
def _hydra(overrides: Sequence[str]) -> Iterator[None]:
    """Hydra set up for `configs/`. Its errors about `overrides` become ConfigErrors."""
    register_schema()
    try:
        with initialize_config_dir(str(config_dir()), version_base=HYDRA_VERSION):
            yield
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from error


def in_sweep() -> bool:
    """True if the job that hydra is running belongs to a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def resolve_job(composed: DictConfig) -> Config:
    """The configuration of the job that hydra is running, with the name that a sweep gives it. Raises ConfigError."""
    return resolve(composed, HydraConfig.get().job.override_dirname if in_sweep() else None)


def resolve(composed: DictConfig, sweep_job: str | None = None) -> Config:
    """Turn hydra's composition (without its `hydra` section) into a validated `Config`. Raises ConfigError.

    sweep_job: the overrides of this job in a sweep, as one string; it becomes part of the run's name.
    """
    try:
        refuse_missing(OmegaConf.missing_keys(composed))
        # Plain values, because hydra lets `+key=value` add settings unknown to the schema; the merge refuses them.
        written = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
        keep_variables(written)
        values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(written), resolve=True))
        config = literal(Config, values)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    if sweep_job is not None:
        config.run.name = sweep_run_name(config.run.name, sweep_job)
    validate(config)
    check_allowed(config.run.allow_changes, config)
    return config


def sweep_run_name(name: str, overrides: str) -> str:
    """multirun/<name>/<overrides>, where the last part is a valid name of one folder."""
    folder = re.sub(r"'([\w.+-]+)'", r"\1", overrides.replace("/", "-"))  # quotes that keep 1e3 a string
    if len(folder) > 160:
        folder = f"{folder[:150]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return "/".join(part for part in ("multirun", name, folder) if part)
