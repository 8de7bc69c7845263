"""A report on the disk: `index.html` and its pictures, a folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleeptrain.errors import DataError
from sleeptrain.files import staged_folder
from sleeptrain.report.figures import draw_section
from sleeptrain.report.groups import Section
from sleeptrain.report.page import page
from sleeptrain.report.style import png

INDEX = "index.html"


def write_report(found: Sequence[Section], out: Path, title: str) -> Path:
    """Writes the page of these sections into the folder `out`, in the place of an older report; returns the page.

    Raises DataError where `out` holds anything else.
    """
    check_out(out)
    with staged_folder(out, replace=True) as folder:
        parts = []
        for section in found:
            pictures = []
            for drawn in draw_section(section):
                picture = png(drawn.figure)
                (folder / f"{section.source}-{drawn.name}.png").write_bytes(picture)
                pictures.append((drawn.title, picture))
            parts.append((section, pictures))
        (folder / INDEX).write_text(page(title, parts), encoding="utf-8")
    return out / INDEX


def check_out(out: Path) -> None:
    """Raises DataError where `out` is neither new, nor empty, nor an older report."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder for the report with --out")
    held = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = [name for name in held if name != INDEX and not name.endswith(".png")]
    if foreign or (held and INDEX not in held):
        raise DataError(f"{out} holds {min(foreign or held)}, which is no report; name another folder with --out")
