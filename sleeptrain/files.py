"""Files and folders that appear whole or not at all: built under a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sleeptrain.errors import DataError, naming

_LEFTOVER = re.compile(r"\..+\.(partial|old)-[0-9a-f]{8}")


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk. Renames then survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(target: Path, what: str) -> Path:
    """A name beside `target` that no other process uses, on this machine or on others that share the file system."""
    return target.with_name(f".{target.name}.{what}-{secrets.token_hex(4)}")


def remove_leftovers(folder: Path) -> None:
    """Remove the files and folders with names of `beside` that killed processes have left in a folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write to. When the block ends, it is on the disk and replaces `target`; if the block fails, it is
    removed."""
    partial = beside(target, "partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    sync(target.parent)


def write_whole(target: Path, content: bytes) -> None:
    """Write a file that other processes see either whole or not at all; it replaces an existing file."""
    with whole_file(target) as file:
        file.write(content)


@contextlib.contextmanager
def staged_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `target`. It is renamed to `target` when the block ends and removed if the block fails.

    replace: the new folder replaces an existing one, which stays unchanged until the block ends. Raises DataError if
    `target` exists without `replace` (an empty folder does not count), or if the new folder cannot be made.
    """
    with naming(f"{target} cannot be written"):
        _refuse_existing(target, replace)
        partial = beside(target, "partial")
        partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        _refuse_existing(target, replace)
        set_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(target.parent)


def _refuse_existing(target: Path, replace: bool) -> None:
    if os.path.lexists(target) and not target.is_dir():
        what = "a link to nothing" if target.is_symlink() else "a file"
        raise DataError(f"{target} is {what}; name a folder")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise DataError(f"{target} exists and is not empty; remove it or name another folder")


def set_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`. A rename cannot replace a full folder, so an old `target` is renamed first."""
    old = beside(target, "old")
    if not target.exists():
        os.rename(partial, target)
        return
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
