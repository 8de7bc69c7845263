"""A checkpoint on disk: a folder that appears whole, and a manifest by which damage is found.

`step-00000012/` holds safetensors files, `state.json`, `config.yaml` and, written last, `manifest.json` with the size
and the sha256 of every other file. It is built under a hidden name beside its place and renamed.
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

FORMAT = 2
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
    """What the manifest says of these files: {name: {"bytes", "sha256"}}."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def commit(partial: Path, target: Path, tensors: Mapping[str, Any], documents: Mapping[str, bytes]) -> None:
    """Completes a folder of synced tensor files, of which `tensors` are the entries, and puts it in its place.

    A damaged checkpoint of the same step gives way. The pointer `latest` beside it follows last. Raises DataError where
    a file that another process has written is not there.
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
    """Makes a checkpoint of a folder; files: the entries of all others in it."""
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def point_to(checkpoint: Path) -> None:
    """The pointer `latest` names the checkpoint."""
    write_whole(checkpoint.parent / LATEST, f"{checkpoint.name}\n".encode())


def find_damage(checkpoint: Path, rank: int = 0, size: int = 1, tensors: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where nothing is; of `size` processes each checks its share of the files.

    tensors: whether those are read, too; where not, only their sizes are compared, which takes no time. Raises
    DataError for a checkpoint of another format: it is not damaged, only not for this version.
    """
    if foreign := _no_plain_file(checkpoint, [MANIFEST]):
        return foreign
    try:
        manifest = parse_json(read_bounded(checkpoint / MANIFEST, SETTINGS_BYTES))
        version, files = manifest["format"], manifest["files"]
        if version != FORMAT:
            raise DataError(f"checkpoint {checkpoint} has format {version}, this version of sleeptrain reads {FORMAT}")
        if foreign := _no_plain_file(checkpoint, [*files, STATE, CONFIG]):
            return foreign
        if absent := sorted({STATE, CONFIG} - set(files)):
            return f"{absent[0]} is not in {MANIFEST}"
        if unknown := sorted({path.name for path in checkpoint.glob(TENSORS)} - set(files)):
            return f"{unknown[0]} is not in {MANIFEST}"
        for name in sorted(files)[rank::size]:
            found, wanted = (checkpoint / name).stat().st_size, files[name]["bytes"]
            if found != wanted:
                return f"{name} has {found} bytes, not {wanted}"
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
    """What is wrong with these names of files, before any of them is opened."""
    try:
        for name in names:
            named_file(checkpoint, name, checkpoint / MANIFEST, follow=True)
    except DataError as error:
        return str(error)
    return None


def read_state(checkpoint: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """What a checkpoint knows besides tensors. required: as of `state_schema.fault`. Raises DataError for anything
    else, also behind a manifest that vouches for it: whoever writes one can write the other."""
    found = read_json(checkpoint / STATE, WAY_OUT)
    if wrong := fault(found, required):
        raise DataError(f"{checkpoint / STATE} is none of this version of sleeptrain: {wrong}; {WAY_OUT}")
    return found


def set_aside(checkpoint: Path) -> Path:
    """Takes a damaged checkpoint out of the way, for whoever wants to look at it. Returns where it is now."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    return aside


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
