"""Safe output of untrusted text to a terminal, a log or a page.

File names, documents, settings and errors may hold characters that a terminal acts on: escape sequences, the bell,
marks that change the direction of writing. These are shown as Python escapes (`\\x1b`). All text for people goes
through `say` or `printable`. JSON does not need that, because JSON escapes such characters.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import traceback
from types import TracebackType
from typing import NoReturn, TextIO

# Control characters, separators of lines and paragraphs, characters without width (except the two joiners, which
# scripts and emoji need), direction marks, tags, lone surrogates, and code points that are no characters.
_HOSTILE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 17))
    + "]"
)
_USER = re.compile(r"(?<=://)[^\s/'\"]+@")
_SIGNATURE = re.compile(
    r"([?&][^\s=&'\"]*(?:sig|token|secret|passw|credential|api_?key|access_?key)[^\s=&'\"]*=)[^\s&'\"]+", re.IGNORECASE
)


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with an escape for each character that a terminal acts on or an XML reader refuses.

    keep: control characters that stay; pass "" for a text of one line.
    """
    return _HOSTILE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def hide_credentials(text: str) -> str:
    """The text without the user and password of its URLs (`https://***@host`), and without signatures and keys."""
    return _SIGNATURE.sub(r"\1***", _USER.sub("***@", text))


def shown(text: str, keep: str = "\n\t") -> str:
    """A message, printable and without credentials. keep: as in `printable`."""
    return hide_credentials(printable(text, keep))


def say(text: str, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print a message for people. file: standard output by default."""
    print(shown(text), file=file or sys.stdout, end=end, flush=flush)


def say_document(text: str) -> None:
    """Print a text with nothing changed except the characters that a terminal acts on."""
    print(printable(text))  # noqa: T201


def say_json(text: str) -> None:
    """Print JSON for programs, unchanged."""
    print(text, flush=True)  # noqa: T201


def log_printable(name: str) -> logging.Logger:
    """The logger of a module. Its messages are printable and show no credentials."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = shown(record.getMessage()), None
    return True


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, printable and without credentials. Fits `sys.excepthook`."""
    say("".join(traceback.format_exception(kind, error, trace)), sys.stderr, end="")


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose error messages are printable, because arguments may be untrusted file names."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, keep=""))
