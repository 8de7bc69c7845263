"""The files below a folder. Links are followed, and each file counts once, however many names it has."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from sleeptrain.errors import DataError
from sleeptrain.plain_files import same_file


def names_below(folder: Path, pattern: str, hidden: bool = True) -> Iterator[str]:
    """Names below `folder`, relative to it, that match `pattern` part by part (`**`: any number of folders).

    Each folder is listed once, under its name without links if it has one, else under the first link to it; this also
    ends circles of links. Broken links are yielded whatever their names are.
    hidden: `*` also matches names that begin with a dot. Raises DataError if a folder cannot be listed.
    """
    parts = PurePosixPath(pattern).parts
    seen: set[tuple[int, int] | str] = set()
    linked = deque([""])
    while linked:
        pending = [linked.popleft()]
        while pending:
            place = pending.pop()
            if (identity := same_file(folder / place)) in seen:
                continue
            seen.add(identity)
            for entry in _entries(folder / place):
                name = f"{place}/{entry.name}" if place else entry.name
                if os.path.isdir(entry.path):  # DirEntry.is_dir() raises OSError for a link to itself
                    (linked if entry.is_symlink() else pending).append(name)
                elif matches(name.split("/"), parts, hidden) or not os.path.exists(entry.path):
                    yield name


def each_once(folder: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return (names of plain files, names left out with the reason). All names are relative to `folder`.

    The plain files are sorted, and each file is in the list once: under its first name that is no link, else under its
    first link.
    """
    chosen: dict[tuple[int, int] | str, str] = {}
    left_out = []
    for name in sorted(names, key=lambda name: (os.path.islink(folder / name), name)):
        try:
            kind = os.stat(folder / name).st_mode
        except OSError as error:
            left_out.append(f"{name} ({error.strerror})")
            continue
        if stat.S_ISREG(kind):
            chosen.setdefault(same_file(folder / name), name)
        elif not stat.S_ISDIR(kind):
            left_out.append(f"{name} (no plain file)")
    return sorted(chosen.values()), left_out


def matches(names: Sequence[str], parts: Sequence[str], hidden: bool = True) -> bool:
    """True if the parts of a path match the parts of a pattern."""
    if not parts:
        return not names
    if parts[0] == "**" and matches(names, parts[1:], hidden):
        return True
    if not names or (names[0].startswith(".") and not hidden and not parts[0].startswith(".")):
        return False
    if parts[0] == "**":
        return matches(names[1:], parts, hidden)
    return fnmatch.fnmatchcase(names[0], parts[0]) and matches(names[1:], parts[1:], hidden)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
