"""Text that does harm where it is shown as it is."""

from __future__ import annotations

import re

# A title of the terminal's window, colour, the bell, a line over the one before, marks of direction, NUL, C1.
HOSTILE = "\x1b]0;owned\x07\x1b[31m[bold red]x\r\x9b2J\u202etxt\u2066\x00<b>&'\"$a$"
SURROGATE = HOSTILE + "\udc80\ufffe"  # of a file name that is not UTF-8, or of an escape in JSON
IN_FILE_NAMES = HOSTILE.replace("\x00", "") + "\udc80"

_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe]")


def is_harmless(text: str) -> bool:
    return not _RAW.search(text)
