"""`SleepPretrainedConfig`: the settings of a sleeping model in `config.json` of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from sleeptrain.config import schema
from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.suggest import suggest
from sleeptrain.config.validate import validate_model
from sleeptrain.errors import ConfigError
from sleeptrain.hf.convert.config_file import read_config, understanding
from sleeptrain.hf.convert.gate_file import GATE_PASSES, check_gate
from sleeptrain.hf.convert.native import text_config
from sleeptrain.hf.families import FAMILIES, family_of
from sleeptrain.kinds import is_count

MODEL_TYPE = "sleeptrain"
# The settings `sleep.*` that change the model's output; the others concern training.
SLEEP_SETTINGS = (
    "passes",
    "window",
    "when",
    "feedback",
    "eviction",
    "conv_state",
    "core",
    "stop",
    "stop_threshold",
    "min_passes",
)


class SleepPretrainedConfig(PreTrainedConfig):
    """The settings of a model and of its sleep.

    model: the settings `model.*` (`sleeptrain.config.schema.ModelConfig`).
    sleep: the settings `sleep.*` in SLEEP_SETTINGS; missing ones have their defaults.
    stop_gate_passes: the most passes that the gate of `sleep.stop=gate` knows, whose weights the model holds; 0: none.

    `from_pretrained` also reads the `config.json` of a family of `sleeptrain.hf.families`, such as `qwen3_5_text`, with
    the settings of sleep under the extra key `sleep`. Its arguments `model` and `sleep` replace single values of the
    file. Raises ConfigError: an unknown setting, or a value that is not allowed.
    """

    model_type = MODEL_TYPE

    model: dict[str, Any] | None = None
    sleep: dict[str, Any] | None = None
    vocab_size: int = 0
    use_cache: bool = True
    stop_gate_passes: int = 0
    # Tied embeddings are one parameter in `Hybrid`: transformers has nothing to tie.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.model = asdict(self.model_config())
        self.sleep = sleep_dict(_typed(schema.SleepConfig, self.sleep, "sleep", SLEEP_SETTINGS))
        self.vocab_size = self.model["vocab_size"]
        if not is_count(self.stop_gate_passes):
            raise ConfigError(f"config.json: {GATE_PASSES}={self.stop_gate_passes!r} is no number of passes")
        self.sleep_settings()
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        place = Path(str(args[0])) if args else Path()
        if (place / "config.json").is_file():
            read_config(place)
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        return from_family(config_dict), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = dict(config_dict)
        for section in ("model", "sleep"):
            if (overrides := kwargs.pop(section, None)) is not None:
                config_dict[section] = _merged(config_dict.get(section), overrides, section)
        return super().from_dict(config_dict, **kwargs)

    def model_config(self) -> schema.ModelConfig:
        return _typed(schema.ModelConfig, self.model, "model")

    def sleep_settings(self, passes: int | None = None, window: int | None = None) -> schema.SleepConfig:
        """The settings of sleep. passes, window: replace N and L. Raises ConfigError: a value is not allowed."""
        settings = _typed(schema.SleepConfig, self.sleep, "sleep", SLEEP_SETTINGS)
        changes = {"passes": passes, "window": window}
        settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
        validate_model(self.model_config(), settings)
        check_gate(settings, self.stop_gate_passes)
        return settings


def sleep_dict(sleep: schema.SleepConfig) -> dict[str, Any]:
    return {name: getattr(sleep, name) for name in SLEEP_SETTINGS}


def from_family(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the `config.json` of a family to ours; ours is returned unchanged."""
    config_dict = dict(config_dict)
    if config_dict.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        return config_dict
    family = FAMILIES.get(config_dict["model_type"])
    if family is None or family.in_transformers:  # missing keys have transformers' defaults
        with understanding("config.json", "is not understood by transformers"):
            config_dict |= text_config(AutoConfig.for_model(**config_dict), config_dict).to_dict()
    with understanding("config.json"):
        model = family_of(config_dict["model_type"]).from_config(config_dict)
    copied = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", GATE_PASSES)
    ours = {"model_type": MODEL_TYPE, "model": asdict(model), "sleep": config_dict.get("sleep")}
    return ours | {key: config_dict[key] for key in copied if config_dict.get(key) is not None}


def _merged(file_values: Mapping[str, Any] | None, overrides: Any, section: str) -> dict[str, Any]:
    """`file_values` updated with `overrides`, nested mappings too. Raises ConfigError: `overrides` is no mapping."""
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"{section}={overrides!r}: give its settings, as {section}={{'name': value}}")
    inner = {
        name: {**file_values[name], **value}
        for name, value in overrides.items()
        if isinstance(value, Mapping) and file_values and isinstance(file_values.get(name), Mapping)
    }
    return {**(file_values or {}), **overrides, **inner}


def _typed(kind: type, values: Mapping[str, Any] | None, section: str, names: tuple[str, ...] = ()) -> Any:
    """The dataclass `kind` with these values. names: allowed settings; () allows all of `kind`.

    Raises ConfigError: a setting is unknown, or its value has a wrong type.
    """
    for name in values or ():
        if name == "stop_gate":
            raise ConfigError(
                "sleep.stop_gate names a file, and an exported model holds its gate: set it in the run, and export that"
            )
        if names and name not in names:
            raise ConfigError(f"config.json: unknown setting {section}.{name}; {suggest(name, names)}")
    return from_dict(kind, values or {}, f"config.json: {section}")


AutoConfig.register(MODEL_TYPE, SleepPretrainedConfig)
