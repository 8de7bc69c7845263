"""Validation of a composed configuration. Every error names the setting and the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import PurePath

from omegaconf import MISSING

from sleeptrain.config.duration import parse_duration
from sleeptrain.config.mixers import check_mixer, is_recurrent, mixer_names, mixer_settings, recurrent_names
from sleeptrain.config.paths import strings
from sleeptrain.config.ranges import check_ranges, check_section, settings
from sleeptrain.config.schema import (
    Config,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SleepConfig,
    TrainConfig,
)
from sleeptrain.config.shard_rules import check_mixture, check_sources
from sleeptrain.config.task_rows import check_task
from sleeptrain.errors import ConfigError

# Far above any model; the product of three widths and the bytes of a number stays below 2^63.
MOST_LAYERS, MOST_WIDTH, MOST_IDS = 1024, 2**19, 2**31


def validate(config: Config) -> None:
    """Raises ConfigError at the first setting that is missing, out of range, or contradicts another."""
    refuse_missing(name for name, value in settings(config) if value == MISSING)
    check_ranges(config)
    _check_strings(config)
    _check_run(config.run)
    _check_model(config.model)
    _check_inserted(config)
    _check_optim(config)
    _check_curriculum(config.sleep)
    _check_core(config)
    _check_stop(config)
    check_gate_file(config.sleep)
    _check_data(config)
    _check_batches(config)
    _check_health(config)
    _check_max_time(config.train.max_time)


def validate_model(model: ModelConfig, sleep: SleepConfig) -> None:
    """As `validate`, for the model and sleep settings only, if nothing is trained.

    `sleep.stop=gate` needs no file here: an exported model holds its gate.
    """
    config = Config(model=model, sleep=sleep, train=TrainConfig(tokens=1))
    check_ranges(config)
    _check_model(model)
    _check_core(config)
    _check_stop(config)


def refuse_missing(names: Iterable[str]) -> None:
    """Raises ConfigError if `names` is not empty. names: the mandatory settings without a value."""
    missing = sorted(names)
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be set: choose an experiment (experiment=stdlib) or add {missing[0]}=..."
        )


def _check_strings(config: Config) -> None:
    for name, text in strings(asdict(config)):
        if "\0" in text:
            raise ConfigError(f"{name} holds a null character, which no name and no path can: {text!r}")


def _check_run(run: RunConfig) -> None:
    path = PurePath(run.name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"run.name must name a folder inside run.root, not '{run.name}'")
    for name, patterns in (("run.init_new", run.init_new), ("run.init_dropped", run.init_dropped)):
        if patterns and not run.init_from:
            raise ConfigError(f"{name} says how a checkpoint may differ: name the checkpoint in run.init_from")


def _check_inserted(config: Config) -> None:
    inserted, num_blocks = config.run.init_inserted, len(config.model.layers)
    if not inserted:
        return
    if not config.run.init_from:
        raise ConfigError("run.init_inserted says what a checkpoint lacks: name the checkpoint in run.init_from")
    odd = [block for block in inserted if not 0 <= block < num_blocks or inserted.count(block) > 1]
    if odd:
        raise ConfigError(
            f"run.init_inserted must name blocks of model.layers, 0 to {num_blocks - 1}, once each, not {odd[0]}"
        )


def _check_model(model: ModelConfig) -> None:
    _check_size(model)
    if not model.layers:
        raise ConfigError(f"model.layers must list at least one mixer; allowed: {', '.join(mixer_names())}")
    for index, mixer in enumerate(model.layers):
        check_mixer(mixer, f"model.layers[{index}]")
        check_section(mixer_settings(model, mixer), f"model.mixers.{mixer}.")
    if unused := [name for name in model.mixers if name not in model.layers]:
        raise ConfigError(f"model.mixers.{unused[0]}: no block of model.layers has a mixer of this name")
    if odd := [block for block in model.mixer_only if not 0 <= block < len(model.layers)]:
        raise ConfigError(
            f"model.mixer_only holds {odd[0]}, but the blocks of model.layers are 0 to {len(model.layers) - 1}"
        )
    if model.sandwich_norms and model.attention.post_norm:
        raise ConfigError("model.sandwich_norms and model.attention.post_norm place norms differently: choose one")
    if len(set(model.mixer_only)) < len(model.mixer_only):
        raise ConfigError(f"model.mixer_only names a block twice: {model.mixer_only}")
    attention = model.attention
    rotary_dims = attention.head_dim * attention.partial_rotary_factor
    if abs(rotary_dims / 2 - round(rotary_dims / 2)) > 1e-9:
        raise ConfigError(
            f"model.attention.partial_rotary_factor ({attention.partial_rotary_factor}) of model.attention.head_dim "
            f"({attention.head_dim}) must be an even number of dimensions, not {rotary_dims:g}"
        )


def _check_size(model: ModelConfig) -> None:
    """Limit the number of blocks, so that later checks stay fast, and the widths, so that no size overflows."""
    if len(model.layers) > MOST_LAYERS:
        raise ConfigError(f"model.layers lists {len(model.layers):,} blocks: {MOST_LAYERS:,} are the most")
    for name, value in settings(model, "model."):
        most = MOST_IDS if name == "model.vocab_size" else MOST_WIDTH
        if type(value) is int and value > most:
            raise ConfigError(f"{name} ({value}) is larger than any model has: {most:,} at most")


def _check_optim(config: Config) -> None:
    optim = config.optim
    if len(optim.adamw_betas) != 2:
        raise ConfigError(f"optim.adamw_betas must be two numbers, not {optim.adamw_betas}")
    decays = [("optim.muon_momentum", optim.muon_momentum)]
    decays += [(f"optim.adamw_betas[{index}]", beta) for index, beta in enumerate(optim.adamw_betas)]
    for name, value in decays:
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must be at least 0 and less than 1, not {value}")
    if optim.schedule == "wsd" and optim.warmup_fraction + optim.decay_fraction > 1:
        raise ConfigError(
            f"optim.warmup_fraction ({optim.warmup_fraction}) and optim.decay_fraction ({optim.decay_fraction}) "
            "must not add up to more than 1"
        )

    _check_frozen(optim)


def _check_frozen(optim: OptimConfig) -> None:
    before = 0
    for index, stage in enumerate(optim.curriculum):
        if stage.tokens <= before:
            raise ConfigError(
                f"optim.curriculum[{index}].tokens ({stage.tokens}) must be greater than {before}: sort the stages; "
                "what holds from the first token on is optim.frozen"
            )
        before = stage.tokens
    for index, rate in enumerate(optim.rates):
        if not (math.isfinite(rate.factor) and rate.factor > 0):
            raise ConfigError(
                f"optim.rates[{index}].factor must be a number greater than 0, not {rate.factor}; what is not to be "
                "trained is named in optim.frozen"
            )


def _check_curriculum(sleep: SleepConfig) -> None:
    for index, stage in enumerate(sleep.curriculum):
        name = f"sleep.curriculum[{index}]"
        if stage.tokens < 1:
            raise ConfigError(
                f"{name}.tokens must be at least 1, not {stage.tokens}: what holds from the first token on are "
                "sleep.passes, sleep.window and data.batch"
            )
        if index and stage.tokens <= sleep.curriculum[index - 1].tokens:
            raise ConfigError(
                f"{name}.tokens ({stage.tokens}) must be greater than that of the stage before "
                f"({sleep.curriculum[index - 1].tokens}): sort the stages, one for each number of tokens"
            )
        values = {"passes": stage.passes, "window": stage.window, "batch": stage.batch}
        if all(value is None for value in values.values()):
            raise ConfigError(f"{name} changes nothing: give it passes, window or batch, or leave it out")
        check_section(stage, f"{name}.")
        if stage.ramp != "step" and stage.passes is None:
            raise ConfigError(f"{name}.ramp={stage.ramp} leads to a number of passes: give it passes")


def values_in_force(config: Config, key: str, base: int, base_name: str) -> list[tuple[str, int]]:
    """(setting, value) of the base value and of each curriculum stage that sets `key`."""
    stages = enumerate(config.sleep.curriculum)
    values = [(f"sleep.curriculum[{index}].{key}", getattr(stage, key)) for index, stage in stages]
    return [(base_name, base), *((name, value) for name, value in values if value is not None)]


def _check_core(config: Config) -> None:
    sleep, layers = config.sleep, config.model.layers
    core = sleep.core if sleep.core is not None else [0, len(layers)]
    if len(core) != 2 or not 0 <= core[0] < core[1] <= len(layers):
        raise ConfigError(
            f"sleep.core must be [first, last) with 0 <= first < last <= {len(layers)} (the blocks of model.layers), "
            f"not {sleep.core}"
        )
    if config.model.norm_between_passes and core[1] < len(layers):
        raise ConfigError(
            "model.norm_between_passes feeds back what the last norm makes of the last block's features, but "
            f"sleep.core ({sleep.core}) ends before it: leave sleep.core empty or let it end at {len(layers)}"
        )
    if any(is_recurrent(mixer) for mixer in layers[core[0] : core[1]]):
        return
    for name, passes in values_in_force(config, "passes", sleep.passes, "sleep.passes"):
        if passes > 1:
            where = "model.layers" if sleep.core is None else f"blocks {sleep.core} of model.layers (sleep.core)"
            raise ConfigError(
                f"{name}={passes}: a plain transformer cannot sleep: {where} hold no recurrent layer "
                f"({' or '.join(recurrent_names())}) to keep a window in; add one, or take one pass (sleep=wake)"
            )


def _check_stop(config: Config) -> None:
    sleep = config.sleep
    most_passes = max(value for _, value in values_in_force(config, "passes", sleep.passes, "sleep.passes"))
    if sleep.stop in ("acceleration", "gate") and sleep.feedback == "none":
        raise ConfigError(
            f"sleep.stop={sleep.stop} reads features that go from pass to pass, and with sleep.feedback=none none do: "
            "use sleep.stop=change, or sleep.feedback=features"
        )
    if sleep.stop != "fixed" and sleep.min_passes > most_passes:
        raise ConfigError(
            f"sleep.min_passes ({sleep.min_passes}) is more than the most passes of a window ({most_passes}), so "
            f"sleep.stop={sleep.stop} would never end a sleep: lower it, or raise sleep.passes"
        )


def check_gate_file(sleep: SleepConfig) -> None:
    """Raises ConfigError: `sleep.stop=gate` without its file."""
    if sleep.stop == "gate" and not sleep.stop_gate:
        raise ConfigError(
            "sleep.stop=gate needs sleep.stop_gate: name the file that sleeptrain calibrate --fit-gate writes"
        )


def _check_data(config: Config) -> None:
    data, sleep = config.data, config.sleep
    windows = values_in_force(config, "window", sleep.window, "sleep.window")
    if data.source != "shards":
        check_task(data, windows)
        return
    for name, window in windows:
        if window > data.sequence:
            raise ConfigError(
                f"{name} ({window}) is longer than data.sequence ({data.sequence}): shorten it or lengthen the sequence"
            )
    if sleep.when == "unlabelled":
        raise ConfigError(
            "sleep.when=unlabelled does not go with data.source=shards: every token there has a target, so no window "
            "would ever sleep; write sleep.when=every"
        )
    check_sources(data.shards.sources)
    check_mixture(data.shards)


def _check_batches(config: Config) -> None:
    micro_batch = config.train.micro_batch
    for name, batch in values_in_force(config, "batch", config.data.batch, "data.batch"):
        if micro_batch and batch % micro_batch:
            raise ConfigError(
                f"train.micro_batch ({micro_batch}) must divide {name} ({batch}): change one of them, "
                "or write train.micro_batch=0 for the whole batch at once"
            )


def _check_health(config: Config) -> None:
    health = config.health
    for name, seconds in (("lost_after", health.lost_after), ("stall_after", health.stall_after)):
        if seconds >= health.timeout:
            raise ConfigError(
                f"health.{name} ({seconds} s) must be less than health.timeout ({health.timeout} s), after which "
                "operations between processes fail without saying whom they wait for: change one of them"
            )
    for name, policy in (("on_nonfinite", health.on_nonfinite), ("on_spike", health.on_spike)):
        if policy == "rollback" and not config.checkpoint.every:
            raise ConfigError(
                f"health.{name}=rollback goes back to a checkpoint, but checkpoint.every=0 writes none on the way: set "
                f"checkpoint.every, or health.{name}=stop or skip"
            )


def _check_max_time(max_time: str | None) -> None:
    if max_time in (None, "auto"):
        return
    try:
        parse_duration(max_time)
    except ValueError as error:
        raise ConfigError(f"train.max_time: {error}; or auto, or null for no limit") from error
