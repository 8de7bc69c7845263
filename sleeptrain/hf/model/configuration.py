"""The settings of a sleeping model as transformers keeps them in `config.json`."""

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
from sleeptrain.hf.convert.native import text_config
from sleeptrain.hf.families import FAMILIES, family_of

MODEL_TYPE = "sleeptrain"
# What of `sleep.*` decides what a model computes; the rest is about training it.
SLEEP_SETTINGS = ("passes", "window", "when", "feedback", "eviction", "conv_state", "core")


class SleepPretrainedConfig(PreTrainedConfig):
    """A model and how it sleeps.

    model: the settings `model.*` (`sleeptrain.config.schema.ModelConfig`). sleep: those of `sleep.*` that are named in
    SLEEP_SETTINGS; what is left out has its default. `from_pretrained` also reads the `config.json` of a family of
    `sleeptrain.hf.families`, such as `qwen3_5_text`, with our settings under the extra key `sleep`; of a `model` or
    `sleep` that it is given, what is left out has the value of the file. Raises ConfigError for an unknown setting or a
    value that is none of the allowed ones.
    """

    model_type = MODEL_TYPE

    model: dict[str, Any] | None = None
    sleep: dict[str, Any] | None = None
    vocab_size: int = 0
    use_cache: bool = True
    # Tied embeddings are one parameter of our model: there is nothing for transformers to tie.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.model = asdict(self.model_config())
        self.sleep = sleep_dict(_typed(schema.SleepConfig, self.sleep, "sleep", SLEEP_SETTINGS))
        self.vocab_size = self.model["vocab_size"]
        self.sleep_settings()
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        place = Path(str(args[0])) if args else Path()
        if (place / "config.json").is_file():
            read_config(place)
        found, unused = super().get_config_dict(*args, **kwargs)
        return from_family(found), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = dict(config_dict)
        for section in ("model", "sleep"):
            if (given := kwargs.pop(section, None)) is not None:
                config_dict[section] = _merged(config_dict.get(section), given, section)
        return super().from_dict(config_dict, **kwargs)

    def model_config(self) -> schema.ModelConfig:
        return _typed(schema.ModelConfig, self.model, "model")

    def sleep_settings(self, passes: int | None = None, window: int | None = None) -> schema.SleepConfig:
        """The settings, with N and L replaced where they are given. Raises ConfigError."""
        settings = _typed(schema.SleepConfig, self.sleep, "sleep", SLEEP_SETTINGS)
        changes = {"passes": passes, "window": window}
        settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
        validate_model(self.model_config(), settings)
        return settings


def sleep_dict(sleep: schema.SleepConfig) -> dict[str, Any]:
    return {name: getattr(sleep, name) for name in SLEEP_SETTINGS}


def from_family(found: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a family's model as one of ours; one of ours as it is."""
    found = dict(found)
    if found.get("model_type", MODEL_TYPE) == MODEL_TYPE:
        return found
    family = FAMILIES.get(found["model_type"])
    if family is None or family.in_transformers:  # what its config.json leaves out has transformers' defaults
        with understanding("config.json", "is not understood by transformers"):
            found |= text_config(AutoConfig.for_model(**found), found).to_dict()
    with understanding("config.json"):
        model = family_of(found["model_type"]).from_config(found)
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")
    ours = {"model_type": MODEL_TYPE, "model": asdict(model), "sleep": found.get("sleep")}
    return ours | {key: found[key] for key in kept if found.get(key) is not None}


def _merged(written: Mapping[str, Any] | None, given: Any, section: str) -> dict[str, Any]:
    """`written` with the values of `given`, down to its sections. Raises ConfigError where that is no mapping."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{section}={given!r}: give its settings, as {section}={{'name': value}}")
    inner = {
        name: {**written[name], **value}
        for name, value in given.items()
        if isinstance(value, Mapping) and written and isinstance(written.get(name), Mapping)
    }
    return {**(written or {}), **given, **inner}


def _typed(kind: type, given: Mapping[str, Any] | None, section: str, names: tuple[str, ...] = ()) -> Any:
    """The dataclass with these settings. Raises ConfigError for one that it does not have or of a wrong type."""
    for name in given or ():
        if names and name not in names:
            raise ConfigError(f"config.json: unknown setting {section}.{name}; {suggest(name, names)}")
    return from_dict(kind, given or {}, f"config.json: {section}")


AutoConfig.register(MODEL_TYPE, SleepPretrainedConfig)
