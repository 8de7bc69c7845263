"""Files that other files name, such as the weights that an index lists: only plain files inside the same folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from sleeptrain.errors import DataError


def named_file(folder: Path, name: Any, named_by: Path, follow: bool = False) -> Path:
    """The file `name` of a folder, as `named_by` calls it; it may be missing.

    Raises DataError for an absolute name, one that leads out of the folder, and what is no plain file (a folder, a
    pipe, a device), which could block the reader. A link may lead out of the folder only with `follow`, for files whose
    content a checksum guards; where the folder is a snapshot in the cache of the Hugging Face hub, it may lead to the
    files of the same model.
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


def require_plain(path: Path) -> None:
    """Raises DataError for what is there and is no plain file: to open a pipe would wait for whoever writes to it."""
    try:
        kind = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(kind):
        raise DataError(f"{path} is no plain file; put one there")


def same_file(path: Path) -> tuple[int, int] | str:
    """What is equal for all names of one file or folder, hard links included. Raises DataError: it cannot be read."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)  # some file systems number nothing


def _remedy(named_by: Path) -> str:
    return f"take {named_by.name} and what it names from where they come from again, or leave them alone"


def _places(folder: Path) -> list[Path]:
    """Where the files of a folder may really be."""
    real = Path(os.path.realpath(folder))
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]
