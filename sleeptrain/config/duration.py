"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import re

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)")


def parse_duration(text: str) -> float:
    """Seconds, from `3:55:00`, `1-12:00:00` (a day and twelve hours), `90m`, `2.5h`, `45s` or `2d`.

    Raises ValueError for any other text, and for a duration of 0.
    """
    if match := _CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        length = float(days * 86400 + hours * 3600 + minutes * 60 + seconds)
    elif match := _NUMBER.fullmatch(text):
        length = float(match[1]) * _UNITS[match[2]]
    else:
        raise ValueError(f"'{text}' is no length of time: write 3:55:00, 1-12:00:00, 90m, 2.5h or 45s")
    if not length:
        raise ValueError(f"'{text}' leaves no time at all")
    return length
