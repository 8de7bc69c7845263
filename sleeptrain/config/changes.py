"""What may change when a run goes on: some settings freely, others where they are named, some never."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy

from sleeptrain.config.ranges import settings
from sleeptrain.config.resolved import config_diff
from sleeptrain.config.schema import Config
from sleeptrain.config.suggest import suggest_setting
from sleeptrain.errors import ConfigError

# They touch neither the data of a run nor its mathematics.
FREE = (
    "run.",
    "parallel.",
    "health.lost_after",
    "health.stall_after",
    "health.timeout",
    "health.norms_every",
    "health.compare_every",
    "health.probe_every",
    "health.slow_factor",
    # What is done about a step that goes wrong, not what is taken for one: a run that has stopped may go on otherwise.
    "health.on_",
    "health.max_rollbacks",
    "wandb.",
    "data.shards.on_damage",
    "data.shards.workers",
    "data.shards.cache",
    "sleep.recompute",
    "train.micro_batch",
    "train.log_every",
    "train.max_time",
    "train.threads",
    "checkpoint.",
)
# What a checkpoint holds has their shape, or is a position in what they describe. A name that ends in . or _ stands for
# all that begin with it.
FIXED = (
    "model.vocab_size",
    "model.dim",
    "model.ffn_dim",
    "model.layers",
    "model.mixer_only",
    "model.norm",
    "model.sandwich_norms",
    "model.tie_embeddings",
    "model.attention.num_heads",
    "model.attention.num_kv_heads",
    "model.attention.head_dim",
    "model.attention.gate",
    "model.attention.qk_norm",
    "model.attention.qkv_bias",
    "model.attention.post_norm",
    "model.gated_deltanet.",
    "model.jet.",
    "model.mamba2.",
    "sleep.eviction",
    "sleep.conv_state",
    "data.source",
    "data.seed",
    "data.sequence",
    "data.layout",
    "data.shards.sources",
    "data.shards.curriculum",
    "data.shards.shuffle",
    "data.rule110.width",
    "data.rule110.strings",
    "data.rule110.steps",
    "data.rule110.boundary",
    "data.rule110.label",
    "data.depo.nodes",
    "data.depo.min_nodes",
    "data.depo.hops",
    "data.depo.symbols",
    "data.depo.max_word",
    "data.depo.queries",
    "data.gsm_infinite.min_",
    "data.gsm_infinite.max_",
    "data.gsm_infinite.tokenizer",
    "data.gsm_infinite.train",
)


def is_fixed(name: str) -> bool:
    """Whether a setting, or an item of one (`model.layers[1]`), never changes in a run."""
    name = name.partition("[")[0]
    return name in FIXED or name.startswith(tuple(start for start in FIXED if start.endswith((".", "_"))))


def check_allowed(names: Iterable[str], config: Config) -> None:
    """Raises ConfigError for a name of `run.allow_changes` that is no setting, or one that cannot change."""
    known = [name for name, _ in settings(config)]
    for name in names:
        if name not in known:
            inside = [other for other in known if other.startswith(f"{name}.")]
            way_out = f"it has {', '.join(inside)}: name them" if inside else suggest_setting(name, Config)
            raise ConfigError(f"run.allow_changes: '{name}' is no setting; {way_out}")
        if is_fixed(name):
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
    allowed = (*FREE, *(f"{name}:" for name in new.run.allow_changes))
    refused = [line for line in lines if not line.startswith(allowed)]
    if refused:
        raise ConfigError(f"{folder} holds a run with other settings; {_way_out(refused)}", refused)
    return lines


def check_same_run(saved: Config, new: Config, checkpoint: str) -> None:
    """Raises ConfigError where a checkpoint's own settings differ in what never changes in a run."""
    lines = [line for line in config_diff(without_places(saved), without_places(new)) if is_fixed(line.split(":")[0])]
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
    names = [line.partition(":")[0] for line in refused]
    return None if any(map(is_fixed, names)) else f"'run.allow_changes=[{','.join(names)}]'"


def without_places(config: Config) -> Config:
    """Data may move from one folder to another: what it is, the saved position knows."""
    config = deepcopy(config)
    for source in config.data.shards.sources:
        source.train = source.validation = ""
    config.data.shards.tokenizer = ""
    return config
