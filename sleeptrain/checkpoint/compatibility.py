"""Compatibility of weights with a model's settings, beyond the names and shapes of parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sleeptrain.config.changes import consent
from sleeptrain.config.mixers import have_same_parameters, reads_setting
from sleeptrain.config.ranges import settings
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError

# Settings that are not compared: another value changes names or shapes of parameters, or only initial values.
NOT_COMPARED = (
    "vocab_size",
    "dim",
    "ffn_dim",
    "layers",  # except kinds of blocks with the same parameters
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
    """Raises ConfigError, with the differences as its details, if `model` may not start from the weights of `saved`.

    It compares all settings that change no names or shapes of parameters; of the mixers' settings only those that
    blocks of both models read. inserted: blocks of `model` that `saved` lacks. allowed: `run.allow_changes`.
    """
    blocks = [block for block in range(len(model.layers)) if block not in inserted]
    pairs = list(zip(blocks, saved.layers, strict=False))
    differences = _differences(saved, model, {kind for _, kind in pairs})
    differences += [
        f"model.layers[{block}]: {before} -> {model.layers[block]}"
        for block, before in pairs
        if before != model.layers[block] and have_same_parameters(before, model.layers[block])
    ]
    refused = [difference for difference in differences if difference.partition(":")[0] not in allowed]
    if refused:
        raise ConfigError(
            f"the weights of run.init_from mean something else with these settings; {_way_out(refused)}", refused
        )


def _differences(saved: ModelConfig, model: ModelConfig, kinds: Collection[str]) -> list[str]:
    before = dict(settings(saved))
    return [
        f"model.{name}: {before[name]} -> {value}"
        for name, value in settings(model)
        if name not in NOT_COMPARED and before[name] != value and any(reads_setting(kind, name) for kind in kinds)
    ]


def _way_out(refused: Sequence[str]) -> str:
    again, added = "take those that they were trained with", consent(refused)
    return f"{again}, or, where the change is meant, add {added}" if added else again
