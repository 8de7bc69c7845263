"""A checkpoint on disk: a folder that appears whole, and a manifest that reveals damage.

`step-00000012/` holds safetensors files, `state.json`, `config.yaml` and, written last, `manifest.json` with the size
and the sha256 of every other file. It is built under a hidden name in the same folder, then renamed. Format 2 had whole
tensors only; format 3 also has fragments of them (`tensor_file.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.state_schema import fault
from sleeptrain.errors import DataError
from sleeptrain.files import set_in_place, sync, write_whole
from sleeptrain.plain_files import named_file
from sleeptrain.small_files import SETTINGS_BYTES, parse_json, read_bounded, read_json

FORMAT, READABLE = 3, (2, 3)
MANIFEST, STATE, CONFIG, LATEST = "manifest.json", "state.json", "config.yaml", "latest"
TENSORS = "*.safetensors"
WAY_OUT = "use another checkpoint"
_NAME = re.compile(r"step-(\d{8,})")

Entries = dict[str, dict[str, Any]]


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def entries(paths: Sequence[Path]) -> Entries:
    """The manifest's entries of these files: {name: {"bytes", "sha256"}}."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def commit(partial: Path, target: Path, tensors: Mapping[str, Any], documents: Mapping[str, bytes]) -> None:
    """Completes a folder of synced tensor files and renames it to `target`.

    tensors: the entries of the tensor files. A damaged checkpoint of the same step is replaced. The pointer `latest` is
    updated last. Raises DataError if a file of another process is missing.
    """
    if missing := [name for name in tensors if not (partial / name).is_file()]:
        raise DataError(f"{missing[0]} was written where this process does not see it: put run.root where all can")
    for name, content in documents.items():
        write_whole(partial / name, content)
    write_manifest(partial, {**tensors, **entries([partial / name for name in documents])})
    sync(partial)
    set_in_place(partial, target)
    sync(target.parent)
    point_to(target)


def write_manifest(folder: Path, files: Mapping[str, Any]) -> None:
    """Writes the manifest, which makes a folder a checkpoint. files: the entries of all other files in it."""
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def point_to(checkpoint: Path) -> None:
    """Lets the pointer `latest` name the checkpoint."""
    write_whole(checkpoint.parent / LATEST, f"{checkpoint.name}\n".encode())


def find_damage(checkpoint: Path, rank: int = 0, size: int = 1, tensors: bool = True) -> str | None:
    """The damage of a checkpoint, in words; None if it has none.

    rank, size: the process checks its share of the files, one of `size` shares.
    tensors: read the tensor files, too; False: compare only their sizes, which is fast.
    Raises DataError for a checkpoint of another format, which is not damaged.
    """
    if foreign := _no_plain_file(checkpoint, [MANIFEST]):
        return foreign
    try:
        manifest = parse_json(read_bounded(checkpoint / MANIFEST, SETTINGS_BYTES))
        version, files = manifest["format"], manifest["files"]
        if version not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise DataError(f"checkpoint {checkpoint} has format {version}, this version of sleeptrain reads {known}")
        if foreign := _no_plain_file(checkpoint, [*files, STATE, CONFIG]):
            return foreign
        if absent := sorted({STATE, CONFIG} - set(files)):
            return f"{absent[0]} is not in {MANIFEST}"
        if unknown := sorted({path.name for path in checkpoint.glob(TENSORS)} - set(files)):
            return f"{unknown[0]} is not in {MANIFEST}"
        for name in sorted(files)[rank::size]:
            actual, expected = (checkpoint / name).stat().st_size, files[name]["bytes"]
            if actual != expected:
                return f"{name} has {actual} bytes, not {expected}"
        read = [name for name in sorted(files)[rank::size] if tensors or not fnmatch(name, TENSORS)]
        for name in read:
            if _sha256(checkpoint / name) != files[name]["sha256"]:
                return f"the checksum of {name} is not that of {MANIFEST}"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def _no_plain_file(checkpoint: Path, names: Sequence[str]) -> str | None:
    """The fault of these file names, found before any file is opened; None if they all name plain files."""
    try:
        for name in names:
            named_file(checkpoint, name, checkpoint / MANIFEST, follow=True)
    except DataError as error:
        return str(error)
    return None


def read_state(checkpoint: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """The content of `state.json`. required: as in `state_schema.fault`.

    Raises DataError for invalid content, even if the manifest matches: the same writer may have made both.
    """
    state = read_json(checkpoint / STATE, WAY_OUT)
    if error := fault(state, required):
        raise DataError(f"{checkpoint / STATE} does not fit this version of sleeptrain: {error}; {WAY_OUT}")
    return state


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint to `damaged-<name>`, for inspection. Returns its new path."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    return aside


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
