"""Text that does harm where it is shown unchanged."""

from __future__ import annotations

import re

# Sequences for a window's title, colour, the bell, an overwritten line, marks of direction, NUL, C1.
HOSTILE = "\x1b]0;owned\x07\x1b[31m[bold red]x\r\x9b2J\u202etxt\u2066\x00<b>&'\"$a$"
SURROGATE = HOSTILE + "\udc80\ufffe"  # from a file name that is not UTF-8, or an escape in JSON
IN_FILE_NAMES = HOSTILE.replace("\x00", "") + "\udc80"

_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe]")


def is_harmless(text: str) -> bool:
    return not _RAW.search(text)
