"""Text that comes from elsewhere, on its way to a terminal, a log or a page.

Names of files, texts of documents, settings and errors may hold what a terminal obeys: escape sequences, the bell,
marks that turn the direction of writing. They are shown as Python writes them in a string (`\\x1b`). All that
is printed for people goes through `say` or `printable`; JSON does not, for its own escapes make it harmless.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import traceback
from types import TracebackType
from typing import NoReturn, TextIO

# Control characters, separators of lines and paragraphs, characters without width (but the two joiners that scripts and
# emoji need), marks of direction, tags, lone surrogates, and code points that are no characters.
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
    """The text with everything escaped that a terminal or an XML reader does not take for a character to show.

    keep: control characters that stay; of one line none should.
    """
    return _HOSTILE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def hide_credentials(text: str) -> str:
    """The text without the user and password of its URLs (`https://***@host`), and without signatures and keys."""
    return _SIGNATURE.sub(r"\1***", _USER.sub("***@", text))


def shown(text: str, keep: str = "\n\t") -> str:
    """A message, printable and without credentials. keep: as of `printable`."""
    return hide_credentials(printable(text, keep))


def say(text: str, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """`print` of a message for people. file: standard output by default."""
    print(shown(text), file=file or sys.stdout, end=end, flush=flush)


def say_document(text: str) -> None:
    """`print` of a text that is not ours to change beyond what a terminal would obey."""
    print(printable(text))  # noqa: T201


def say_json(text: str) -> None:
    """`print` of JSON for programs, as it is."""
    print(text, flush=True)  # noqa: T201


def log_printable(name: str) -> logging.Logger:
    """The logger of a module, whose messages are printable and show no credentials."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = shown(record.getMessage()), None
    return True


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`."""
    say("".join(traceback.format_exception(kind, error, trace)), sys.stderr, end="")


class ArgumentParser(argparse.ArgumentParser):
    """Of a command line whose words may be names of other people's files."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, keep=""))
