"""Write a report: a folder with `index.html` and its figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from sleeptrain.errors import DataError
from sleeptrain.files import write_whole
from sleeptrain.report.figures import Drawn, draw_section
from sleeptrain.report.groups import Section
from sleeptrain.report.page import MARK, Picture, digest, page
from sleeptrain.report.panels import keys, panels
from sleeptrain.report.style import png

INDEX = "index.html"


def write_report(sections: Sequence[Section], unreadable: Sequence[str], out: Path, title: str) -> Path:
    """Write the page of these sections into the folder `out`, over an older report. Returns the page's path.

    unreadable: runs that are left out, and the reasons. Each file is written atomically, so two processes may write at
    once. Only figures of the older page that the new one does not have are removed. Raises DataError if `out` is no
    folder for a report, or cannot be written.
    """
    check_out(out)
    parts = [(section, [_picture(section, drawn) for drawn in draw_section(section)]) for section in sections]
    contents = {picture.file: picture.png for _, pictures in parts for picture in pictures}
    html = page(title, parts, unreadable).encode()
    try:
        _remove_old(out, contents)
        # The page first: it marks the folder as a report, even if writing stops here.
        for name, content in [(INDEX, html), *contents.items()]:
            write_whole(out / name, content)
    except OSError as error:
        raise _not_writable(out, error) from error
    return out / INDEX


def check_out(out: Path) -> None:
    """Raise DataError if `out` is a file, cannot be read, or is a folder with other files than those of a report."""
    try:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; name a folder for the report (sleeptrain report --out)")
        names = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
        foreign = [name for name in names if name != INDEX and not name.endswith(".png")]
        if names and MARK.encode() not in _old_page(out):
            foreign = names
    except OSError as error:
        raise _not_writable(out, error) from error
    if foreign:
        raise DataError(
            f"{out} holds {min(foreign)}, which is no part of a report; name another folder (sleeptrain report --out)"
        )


def _remove_old(out: Path, contents: Mapping[str, bytes]) -> None:
    """Remove the figures of the old page that the new page does not have."""
    old = _old_page(out)
    for path in out.glob("*.png"):
        if path.name not in contents and digest(path.read_bytes()).encode() in old:
            path.unlink(missing_ok=True)


def _old_page(out: Path) -> bytes:
    return (out / INDEX).read_bytes() if (out / INDEX).is_file() else b""


def _picture(section: Section, drawn: Drawn) -> Picture:
    """The picture of a page. The file first: panels are drawn without titles and legends."""
    content, on_page = png(drawn.figure), drawn.on_page or drawn.figure
    shared = keys(on_page.axes) if on_page.legends else []
    return Picture(drawn.title, _file_name(section.source, drawn.name), content, shared, panels(on_page))


def _file_name(source: str, name: str) -> str:
    """A distinct file name for each figure, whatever characters the names of held-out sets have."""
    return f"{source}-{quote(name, safe='', errors='surrogatepass')}.png"


def _not_writable(out: Path, error: OSError) -> DataError:
    return DataError(
        f"{out} cannot be read or written: {error.strerror}; name another folder (sleeptrain report --out)"
    )
