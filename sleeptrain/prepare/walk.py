"""The files below a folder: links are followed, and each file counts once, however many names lead to it."""

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

    Each real folder is looked through once: by the name without links where there is one, else by the first link that
    leads to it; links that lead round in circles end there. Links that lead nowhere are among the names, whatever they
    are called. hidden: whether `*` also stands for names that begin with a dot. Raises DataError where a folder cannot
    be listed.
    """
    parts = PurePosixPath(pattern).parts
    seen: set[tuple[int, int] | str] = set()
    linked = deque([""])
    while linked:
        inside = [linked.popleft()]
        while inside:
            place = inside.pop()
            if (this := same_file(folder / place)) in seen:
                continue
            seen.add(this)
            for entry in _entries(folder / place):
                name = f"{place}/{entry.name}" if place else entry.name
                if os.path.isdir(entry.path):  # unlike the entry's own, it raises nothing for a link to itself
                    (linked if entry.is_symlink() else inside).append(name)
                elif matches(name.split("/"), parts, hidden) or not os.path.exists(entry.path):
                    yield name


def each_once(folder: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names of plain files, sorted, each file once; what was left out, and why) of names relative to `folder`.

    Of several names of one file the first counts, one that is no link before links.
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
    """Whether the parts of a path match those of a pattern."""
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
