"""Translate a request of the lm-evaluation-harness to arguments of `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig

from sleeptrain.errors import ConfigError

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Each request gets one text. Its length counts only new tokens.
_FIXED = {"num_return_sequences": 1, "return_dict_in_generate": False}
_EXCLUDED = {"max_length", "min_length", "stop_strings", "transformers_version"}
_KNOWN = [name for name in vars(GenerationConfig()) if name not in _EXCLUDED and not name.startswith("_")]


def stop_strings(request: Mapping[str, Any]) -> list[str]:
    """The strings of `until` at which a text ends."""
    until = request.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end]


def generation_options(request: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Keyword arguments of `generate`. length: number of new tokens of a request without one.

    As in the harness, a request is greedy unless it sets `temperature` or `do_sample`; the length has several names.
    Raises ConfigError: `generate` does not know a setting, or two settings exclude each other.
    """
    settings = {name: value for name, value in request.items() if name != "until" and value is not None}
    lengths = {name: int(settings.pop(name)) for name in LENGTHS if name in settings}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"generation settings {_text(lengths)}: all of them are the length of the new text; give one")
    _check(settings)
    sampled = _sampled(settings)
    if not sampled:
        settings.pop("temperature", None)
    return settings | {"do_sample": sampled, "max_new_tokens": next(iter(lengths.values()), length)}


def _check(settings: Mapping[str, Any]) -> None:
    if "max_length" in settings or "min_length" in settings:
        raise ConfigError(
            "generation settings max_length and min_length count the prompt, too, whose length differs from request to "
            "request; give max_gen_toks and min_new_tokens"
        )
    for name, value in settings.items():
        if name not in _KNOWN:
            near = get_close_matches(name, [*_KNOWN, *LENGTHS, "until"], n=1)
            way_out = f"did you mean '{near[0]}'?" if near else "they are those of transformers' GenerationConfig"
            raise ConfigError(f"unknown generation setting '{name}'; {way_out}")
        if value != _FIXED.get(name, value):
            raise ConfigError(f"generation setting {name}={value}: only {_FIXED[name]} is possible here")


def _sampled(settings: Mapping[str, Any]) -> bool:
    temperature = float(settings.get("temperature", 0))
    sampled = settings.get("do_sample", temperature > 0)
    if sampled and "temperature" in settings and not temperature > 0:
        raise ConfigError("generation settings do_sample=true and temperature=0 exclude each other; leave one out")
    return bool(sampled)


def _text(settings: Mapping[str, Any]) -> str:
    return " and ".join(f"{name}={value}" for name, value in settings.items())
