"""Checks of files that other files name, such as the weights in an index: plain files inside the same folder only."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from sleeptrain.errors import DataError
from sleeptrain.remote import Location


def named_file(folder: Path, name: Any, named_by: Path, follow: bool = False) -> Path:
    """The path of the file `name`, which the file `named_by` names, in a folder; it may be missing.

    follow: a link may point out of the folder. Set it only if a checksum guards the content. In a snapshot of the
    Hugging Face hub's cache, links to the files of the same model are always allowed. Raises DataError for an absolute
    name, a name outside of the folder, and anything but a plain file (a folder, a pipe, a device), because reading it
    could block.
    """
    try:
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise DataError(f"{named_by} names {name}, which lies outside of {folder}; {_remedy(named_by)}")
        real = os.path.realpath(path, strict=True)
        kind = os.stat(real).st_mode
    except OSError:
        return path
    except (TypeError, ValueError) as error:
        raise DataError(f"{named_by} names {name!r}, which is no name of a file; {_remedy(named_by)}") from error
    if not stat.S_ISREG(kind):
        raise DataError(f"{path} is no plain file; {_remedy(named_by)}")
    if not follow and not any(Path(real).is_relative_to(place) for place in _places(folder)):
        raise DataError(f"{path} is a link to {real}, outside of {folder}; put the file itself there")
    return path


def require_plain(path: Location) -> None:
    """Raises DataError if the path exists and is no plain file: opening a pipe would wait for its writer."""
    try:
        kind = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(kind):
        raise DataError(f"{path} is no plain file; put one there")


def same_file(path: Path) -> tuple[int, int] | str:
    """A key that is equal for all names of one file or folder, hard links included. Raises DataError if it cannot be
    read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    # Some file systems have no inode numbers.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _remedy(named_by: Path) -> str:
    return f"take {named_by.name} and what it names from where they come from again, or leave them alone"


def _places(folder: Path) -> list[Path]:
    """The folders in which the files of a folder may be stored, after links are resolved."""
    real = Path(os.path.realpath(folder))
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
