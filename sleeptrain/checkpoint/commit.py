"""How a checkpoint comes into being: whole or not at all, on a disk or in an object store.

On a disk it is built under a hidden name in the same folder, then renamed. An object store cannot rename, so there the
files are written where they stay, and they become a checkpoint with the manifest, which is written last.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sleeptrain.checkpoint.folder import MANIFEST, entry_of, point_to, remove_remote, write_file, write_manifest
from sleeptrain.errors import DataError
from sleeptrain.files import remove_leftovers, set_in_place, sync
from sleeptrain.remote import Location, UrlPath


def prepare(target: Location) -> str:
    """Makes room for a checkpoint; the main process calls it first. Returns a token for `place_of`."""
    if isinstance(target, UrlPath):
        remove_remote(target)  # one of the same step, which is damaged or was not completed
    return secrets.token_hex(4)


def place_of(target: Location, token: str) -> Location:
    """Where all processes write the files of a checkpoint until it is committed."""
    return target if isinstance(target, UrlPath) else target.with_name(f".{target.name}.partial-{token}")


@contextmanager
def new_file(path: Location) -> Iterator[BinaryIO]:
    """A file of a checkpoint to write to. When the block ends, it is stored."""
    if isinstance(path, UrlPath):
        with path.create() as remote:
            yield remote
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def commit(
    place: Location,
    target: Location,
    tensors: Mapping[str, Any],
    documents: Mapping[str, bytes],
    pointer: Path | None = None,
) -> None:
    """Completes a folder of stored tensor files, which becomes the checkpoint `target`.

    tensors: the entries of the tensor files. A damaged checkpoint of the same step is replaced. The pointer `latest`,
    in the folder `pointer` or beside the checkpoint, is updated last. Raises DataError if a file of another process
    is missing.
    """
    if missing := [name for name in tensors if not (place / name).is_file()]:
        where = "checkpoint.folder" if isinstance(place, UrlPath) else "run.root"
        raise DataError(f"{missing[0]} was written where this process does not see it: put {where} where all can")
    for name, content in documents.items():
        write_file(place / name, content)
    write_manifest(place, {**tensors, **{name: entry_of(content) for name, content in documents.items()}})
    if isinstance(place, Path) and isinstance(target, Path):
        sync(place)
        set_in_place(place, target)
        sync(target.parent)
    point_to(target, pointer)


def discard(place: Location) -> None:
    """Removes the files of a checkpoint that was not committed."""
    if not isinstance(place, UrlPath):
        shutil.rmtree(place, ignore_errors=True)
    elif not (place / MANIFEST).exists():
        place.remove_tree()


def remove_unfinished(folder: Location) -> None:
    """Removes what killed processes have written of checkpoints that were not committed."""
    if not isinstance(folder, UrlPath):
        remove_leftovers(folder)
        return
    files = folder.glob("step-*/*")
    whole = {path.parent for path in files if path.name == MANIFEST}
    for place in {path.parent for path in files} - whole:
        place.remove_tree()
