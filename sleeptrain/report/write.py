"""A report on the disk: a folder with `index.html` and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleeptrain.errors import DataError
from sleeptrain.files import write_whole
from sleeptrain.report.figures import draw_section
from sleeptrain.report.groups import TITLES, Section
from sleeptrain.report.page import page
from sleeptrain.report.style import png

INDEX = "index.html"


def write_report(found: Sequence[Section], out: Path, title: str) -> Path:
    """Writes the page of these sections into the folder `out`, over an older report; returns the page.

    Every file appears whole, the page last; two processes may do it at once. Pictures of an older report that have no
    successor are removed. Raises DataError where `out` is no folder for a report or cannot be written.
    """
    check_out(out)
    pictures = {section.source: draw_section(section) for section in found}
    files = {f"{source}-{drawn.name}.png": drawn for source, all_drawn in pictures.items() for drawn in all_drawn}
    contents = {name: png(drawn.figure) for name, drawn in files.items()}
    parts = [
        (section, [(drawn.title, contents[f"{section.source}-{drawn.name}.png"]) for drawn in pictures[section.source]])
        for section in found
    ]
    whole = page(title, parts).encode()
    try:
        for name, content in [*contents.items(), (INDEX, whole)]:
            write_whole(out / name, content)
        for source in TITLES:
            for path in out.glob(f"{source}-*.png"):
                if path.name not in contents:
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}; name another folder with --out") from error
    return out / INDEX


def check_out(out: Path) -> None:
    """Raises DataError where `out` is a file, or a folder that holds anything but a report."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder for the report with --out")
    held = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = [name for name in held if name != INDEX and not name.endswith(".png") and not name.startswith(".")]
    if foreign:
        raise DataError(f"{out} holds {min(foreign)}, which is no part of a report; name another folder with --out")
