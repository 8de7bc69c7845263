"""Whether weights mean in a model what they were trained to mean: what their names and shapes do not show."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sleeptrain.config.changes import consent
from sleeptrain.config.mixers import have_same_parameters, reads_setting
from sleeptrain.config.ranges import settings
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError

# Another value gives parameters other names or shapes, or is of initial values alone.
SHOWN = (
    "vocab_size",
    "dim",
    "ffn_dim",
    "layers",  # but for blocks of two kinds with the same parameters
    "mixer_only",
    "sandwich_norms",
    "tie_embeddings",
    "init_std",
    "attention.qk_norm",
    "attention.qkv_bias",
)


def check_compatible(
    saved: ModelConfig, model: ModelConfig, inserted: Collection[int] = (), allowed: Sequence[str] = ()
) -> None:
    """Raises ConfigError, with the differences as its details, unless the weights of `saved` may begin `model`.

    Compared are all settings that names and shapes of parameters do not show, of mixers those that blocks of both
    models read. inserted: blocks of `model` that `saved` lacks. allowed: `run.allow_changes`.
    """
    kept = [block for block in range(len(model.layers)) if block not in inserted]
    pairs = list(zip(kept, saved.layers, strict=False))
    lines = _differences(saved, model, {kind for _, kind in pairs})
    lines += [
        f"model.layers[{block}]: {before} -> {model.layers[block]}"
        for block, before in pairs
        if before != model.layers[block] and have_same_parameters(before, model.layers[block])
    ]
    refused = [line for line in lines if line.partition(":")[0] not in allowed]
    if refused:
        raise ConfigError(
            f"the weights of run.init_from mean something else with these settings; {_way_out(refused)}", refused
        )


def _differences(saved: ModelConfig, model: ModelConfig, kinds: Collection[str]) -> list[str]:
    before = dict(settings(saved))
    return [
        f"model.{name}: {before[name]} -> {value}"
        for name, value in settings(model)
        if name not in SHOWN and before[name] != value and any(reads_setting(kind, name) for kind in kinds)
    ]


def _way_out(refused: Sequence[str]) -> str:
    again, added = "take those that they were trained with", consent(refused)
    return f"{again}, or, where the change is meant, add {added}" if added else again
