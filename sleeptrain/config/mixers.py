"""The kinds of mixer that `model.layers` may name: the built-in ones, one line each, and those of other packages.

Another package adds a mixer by an entry point of the group `sleeptrain.mixers`. The name of the entry point is the
mixer's name, its object is a `sleeptrain.model.mixers.spec.MixerSpec`. The mixer's settings are in
`model.mixers.<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import ModelConfig
from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError

GROUP = "sleeptrain.mixers"
T = TypeVar("T")


@dataclass(frozen=True)
class Mixer:
    """A built-in mixer.

    section: section of `model` with the mixer's settings.
    recurrent: True if it keeps a state S from window to window.
    spec: its `MixerSpec`, in the notation of entry points (module:object).
    unread: settings of the section that it does not read.
    """

    section: str
    recurrent: bool
    spec: str
    unread: tuple[str, ...] = ()


BUILT_IN = {
    "attention": Mixer("attention", False, "sleeptrain.model.mixers.attention:AttentionSpec", ("sliding_window",)),
    "sliding_attention": Mixer("attention", False, "sleeptrain.model.mixers.sliding_attention:SlidingAttentionSpec"),
    "gated_deltanet": Mixer("gated_deltanet", True, "sleeptrain.model.mixers.gated_deltanet:GatedDeltaNetSpec"),
    "jet": Mixer("jet", True, "sleeptrain.model.mixers.jet:JetSpec"),
    "mamba2": Mixer("mamba2", True, "sleeptrain.model.mixers.mamba2:Mamba2Spec"),
}


@cache
def _brought() -> dict[str, EntryPoint]:
    """The mixers of other packages, by name. Raises ConfigError for the name of a built-in mixer."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    for name, entry in entries.items():
        if name in BUILT_IN:
            raise ConfigError(f"the mixer {name} of {entry.value} has the name of one of sleeptrain's; rename it")
    return entries


def mixer_names() -> list[str]:
    """All kinds that `model.layers` may name."""
    return [*BUILT_IN, *_brought()]


@cache
def brought_spec(kind: str) -> Any:
    """The `MixerSpec` of a mixer from another package. Raises ConfigError if it cannot be imported."""
    entry = _brought()[kind]
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.layers: the mixer '{kind}' cannot be loaded from {entry.value}: {error}") from error


def check_mixer(kind: str, setting: str = "model.layers") -> None:
    """Raises ConfigError for an unknown kind. setting: the setting that names it, for the message."""
    if kind not in mixer_names():
        raise ConfigError(f"{setting}: unknown mixer '{kind}'; {suggest(kind, mixer_names())}")


def is_recurrent(kind: str) -> bool:
    """True if a mixer keeps a state S from window to window. Raises ConfigError for an unknown kind."""
    check_mixer(kind)
    return BUILT_IN[kind].recurrent if kind in BUILT_IN else brought_spec(kind).recurrent


def recurrent_names() -> list[str]:
    return [name for name in mixer_names() if is_recurrent(name)]


def mixer_settings(model: ModelConfig, kind: str) -> Any:
    """The settings of a mixer, as its dataclass. Raises ConfigError for an unknown kind or wrong settings."""
    check_mixer(kind)
    if kind in BUILT_IN:
        return getattr(model, BUILT_IN[kind].section)
    return from_dict(brought_spec(kind).settings_class, model.mixers.get(kind, {}), f"model.mixers.{kind}")


def with_mixer_settings(model: ModelConfig, kind: str, settings: Any) -> ModelConfig:
    """The model with new settings of a mixer. Raises ConfigError for an unknown kind."""
    check_mixer(kind)
    if kind in BUILT_IN:
        return replace(model, **{BUILT_IN[kind].section: settings})
    return replace(model, mixers=model.mixers | {kind: asdict(settings)})


def reads_setting(kind: str, name: str) -> bool:
    """True if a mixer reads a setting of `model` (`jet.num_heads`). All read the settings that belong to no mixer."""
    section, _, rest = name.partition(".")
    if section == "mixers":
        return kind not in BUILT_IN
    if section not in {mixer.section for mixer in BUILT_IN.values()}:
        return True
    return kind in BUILT_IN and BUILT_IN[kind].section == section and rest not in BUILT_IN[kind].unread


def have_same_parameters(kind: str, other: str) -> bool:
    """True if two mixers have weights of the same names and shapes: both share a section of settings."""
    return kind == other or ({kind, other} <= set(BUILT_IN) and BUILT_IN[kind].section == BUILT_IN[other].section)


def of_mixer(table: Mapping[str, T], kind: str, what: str) -> T:
    """The entry of a mixer in a table. what: the table's content, for the message. Raises ConfigError if missing."""
    if kind not in table:
        raise ConfigError(f"model.layers: {what} of the mixer '{kind}' is not known, only that of {', '.join(table)}")
    return table[kind]
