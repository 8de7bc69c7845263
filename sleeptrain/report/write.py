"""A report on the disk: a folder with `index.html` and its pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from sleeptrain.errors import DataError
from sleeptrain.files import write_whole
from sleeptrain.report.figures import draw_section
from sleeptrain.report.groups import Section
from sleeptrain.report.page import MARK, page
from sleeptrain.report.style import png

INDEX = "index.html"


def write_report(found: Sequence[Section], unreadable: Sequence[str], out: Path, title: str) -> Path:
    """Writes the page of these sections into the folder `out`, over an older report; returns the page.

    unreadable: runs that are left out, and why. Every file appears whole; two processes may do it at once. Pictures of
    the older page that have no successor are removed, and nothing else. Raises DataError where `out` is no folder for a
    report or cannot be written.
    """
    check_out(out)
    drawn = [(section, [(one, png(one.figure)) for one in draw_section(section)]) for section in found]
    contents = {_file_name(section.source, one.name): content for section, own in drawn for one, content in own}
    parts = [(section, [(one.title, content) for one, content in own]) for section, own in drawn]
    whole = page(title, parts, unreadable).encode()
    try:
        _remove_old(out, contents)
        # The page first, for by it a folder is known as that of a report, also where the rest is not reached.
        for name, content in [(INDEX, whole), *contents.items()]:
            write_whole(out / name, content)
    except OSError as error:
        raise _not_writable(out, error) from error
    return out / INDEX


def check_out(out: Path) -> None:
    """Raises DataError where `out` is a file, cannot be read, or is a folder that holds anything but a report."""
    try:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; name a folder for the report (sleeptrain report --out)")
        held = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
        foreign = [name for name in held if name != INDEX and not name.endswith(".png")]
        if held and MARK.encode() not in _old_page(out):
            foreign = held
    except OSError as error:
        raise _not_writable(out, error) from error
    if foreign:
        raise DataError(
            f"{out} holds {min(foreign)}, which is no part of a report; name another folder (sleeptrain report --out)"
        )


def _remove_old(out: Path, contents: Mapping[str, bytes]) -> None:
    """The pictures that the old page shows and the new one does not."""
    old = _old_page(out)
    for path in out.glob("*.png"):
        if path.name not in contents and b64encode(path.read_bytes()) in old:
            path.unlink(missing_ok=True)


def _old_page(out: Path) -> bytes:
    return (out / INDEX).read_bytes() if (out / INDEX).is_file() else b""


def _file_name(source: str, name: str) -> str:
    """One for each picture, whatever is in the names of held-out sets."""
    return f"{source}-{quote(name, safe='', errors='surrogatepass')}.png"


def _not_writable(out: Path, error: OSError) -> DataError:
    return DataError(
        f"{out} cannot be read or written: {error.strerror}; name another folder (sleeptrain report --out)"
    )
