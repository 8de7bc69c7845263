"""What a request of the lm-evaluation-harness asks of `generate`, with the names that its tasks use."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig

from sleeptrain.errors import ConfigError

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Here a request gets one text, and its length is that of what is new.
_FIXED = {"num_return_sequences": 1, "return_dict_in_generate": False}
_ELSEWHERE = {"max_length", "min_length", "stop_strings", "transformers_version"}
_KNOWN = [name for name in vars(GenerationConfig()) if name not in _ELSEWHERE and not name.startswith("_")]


def stop_strings(given: Mapping[str, Any]) -> list[str]:
    """The strings of `until` at which a text ends."""
    until = given.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end]


def generation_options(given: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Keyword arguments of `generate`. length: of a request that names none.

    As in the harness a request is greedy unless it has a temperature or says `do_sample`, and its length has several
    names. Raises ConfigError for what `generate` does not know, and for two settings that exclude each other.
    """
    wanted = {name: value for name, value in given.items() if name != "until" and value is not None}
    lengths = {name: int(wanted.pop(name)) for name in LENGTHS if name in wanted}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"generation settings {_told(lengths)}: all of them are the length of the new text; give one")
    _check(wanted)
    sampled = _sampled(wanted)
    if not sampled:
        wanted.pop("temperature", None)
    return wanted | {"do_sample": sampled, "max_new_tokens": next(iter(lengths.values()), length)}


def _check(wanted: Mapping[str, Any]) -> None:
    if "max_length" in wanted or "min_length" in wanted:
        raise ConfigError(
            "generation settings max_length and min_length count the prompt, too, whose length differs from request to "
            "request; give max_gen_toks and min_new_tokens"
        )
    for name, value in wanted.items():
        if name not in _KNOWN:
            near = get_close_matches(name, [*_KNOWN, *LENGTHS, "until"], n=1)
            way_out = f"did you mean '{near[0]}'?" if near else "they are those of transformers' GenerationConfig"
            raise ConfigError(f"unknown generation setting '{name}'; {way_out}")
        if value != _FIXED.get(name, value):
            raise ConfigError(f"generation setting {name}={value}: only {_FIXED[name]} is possible here")


def _sampled(wanted: Mapping[str, Any]) -> bool:
    temperature = float(wanted.get("temperature", 0))
    sampled = wanted.get("do_sample", temperature > 0)
    if sampled and "temperature" in wanted and not temperature > 0:
        raise ConfigError("generation settings do_sample=true and temperature=0 exclude each other; leave one out")
    return bool(sampled)


def _told(settings: Mapping[str, Any]) -> str:
    return " and ".join(f"{name}={value}" for name, value in settings.items())
