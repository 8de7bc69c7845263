"""Checks of the type and range of values read from a file, so that code can calculate with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

# Far above any count of a run, and sums with it stay exact.
LARGEST = 2**62
MOST_FLOPS = 10**36
# Seconds since 1970, until the year 5138: calendar functions accept these.
LATEST = 1e11


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def is_flops(value: Any) -> bool:
    """True for FLOPs of a run, which may be far above `LARGEST` and still fit a float."""
    return type(value) is int and 0 <= value <= MOST_FLOPS


def is_positive(value: Any) -> bool:
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    """True also for NaN and the infinities, because a loss may have these values."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST)


def is_time(value: Any) -> bool:
    return is_number(value) and 0 <= value <= LATEST


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def has(checks: Mapping[str, Check]) -> Check:
    """True for an object that has these fields, and possibly others."""
    return lambda value: isinstance(value, dict) and all(n in value and check(value[n]) for n, check in checks.items())


def exactly(checks: Mapping[str, Check]) -> Check:
    """True for an object that has these fields and no others."""
    return lambda value: has(checks)(value) and len(value) == len(checks)
