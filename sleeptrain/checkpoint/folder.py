"""A checkpoint on a disk or in an object store: a folder that counts when its manifest is there, and reveals damage.

`step-00000012/` holds safetensors files, `state.json`, `config.yaml` and, written last, `manifest.json` with the size
and the sha256 of every other file. Format 2 had whole tensors only; format 3 also has fragments of them
(`tensor_file.py`). `commit.py` says how a folder comes into being.
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
from sleeptrain.config.resolved import load_resolved, run_folder
from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.files import write_whole
from sleeptrain.plain_files import named_file
from sleeptrain.remote import Location, UrlPath, named_place
from sleeptrain.small_files import SETTINGS_BYTES, parse_json, read_bounded, read_json

FORMAT, READABLE = 3, (2, 3)
MANIFEST, STATE, CONFIG, LATEST = "manifest.json", "state.json", "config.yaml", "latest"
CHECKPOINTS = "checkpoints"  # in a run's folder
TENSORS = "*.safetensors"
WAY_OUT = "use another checkpoint"
CHUNK = 16 * 2**20  # of a file in an object store
_NAME = re.compile(r"step-(\d{8,})")

Entries = dict[str, dict[str, Any]]


def checkpoint_folder(config: Config) -> Location:
    """The folder of a run's checkpoints: `checkpoint.folder`, or a folder in the run's own."""
    if config.checkpoint.folder:
        return named_place(config.checkpoint.folder) / config.run.name
    return run_folder(config) / CHECKPOINTS


def checkpoints_of(run: Location) -> Location:
    """The folder of the checkpoints of the run in a local folder; a URL is that folder itself.

    Where the run's settings name a URL, nothing was asked of it: the settings may come from somebody else.
    """
    if isinstance(run, UrlPath):
        return run
    try:
        config = load_resolved(run / CONFIG)
    except ConfigError:  # of another version, or none: the folder may still have checkpoints
        return run / CHECKPOINTS
    return checkpoint_folder(config) if config.checkpoint.folder else run / CHECKPOINTS


def step_folder(folder: Location, step: int) -> Location:
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Location) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Location) -> list[Location]:
    """The checkpoints of a run, whole or damaged, oldest first. In an object store those that have a manifest."""
    found: list[Location]
    if isinstance(folder, UrlPath):
        found = [path.parent for path in folder.glob(f"step-*/{MANIFEST}")]
    else:
        found = list(folder.iterdir()) if folder.is_dir() else []
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def entries(paths: Sequence[Location]) -> Entries:
    """The manifest's entries of these files: {name: {"bytes", "sha256"}}."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def entry_of(content: bytes) -> dict[str, Any]:
    """The manifest's entry of a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_file(path: Location, content: bytes) -> None:
    """Writes a file that others see either whole or not at all."""
    if isinstance(path, UrlPath):
        path.write_bytes(content)
    else:
        write_whole(path, content)


def write_manifest(folder: Location, files: Mapping[str, Any]) -> None:
    """Writes the manifest, which makes a folder a checkpoint. files: the entries of all other files in it."""
    write_file(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def point_to(checkpoint: Location, folder: Path | None = None) -> None:
    """Lets the pointer `latest` name the checkpoint. folder: of the pointer; None: that of the checkpoint."""
    write_file((folder or checkpoint.parent) / LATEST, f"{checkpoint.name}\n".encode())


def find_damage(checkpoint: Location, rank: int = 0, size: int = 1, tensors: bool = True) -> str | None:
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
        return f"{Path(error.filename or checkpoint.name).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def _no_plain_file(checkpoint: Location, names: Sequence[str]) -> str | None:
    """The fault of these file names, found before any file is opened; None if they all name plain files."""
    if isinstance(checkpoint, UrlPath):
        outside = [name for name in names if "/" in name or name in ("", ".", "..")]
        return f"{MANIFEST} names {outside[0]}, which lies outside of {checkpoint}" if outside else None
    try:
        for name in names:
            named_file(checkpoint, name, checkpoint / MANIFEST, follow=True)
    except DataError as error:
        return str(error)
    return None


def read_state(checkpoint: Location, required: Sequence[str] = ()) -> dict[str, Any]:
    """The content of `state.json`. required: as in `state_schema.fault`.

    Raises DataError for invalid content, even if the manifest matches: the same writer may have made both.
    """
    state = read_json(checkpoint / STATE, WAY_OUT)
    if error := fault(state, required):
        raise DataError(f"{checkpoint / STATE} does not fit this version of sleeptrain: {error}; {WAY_OUT}")
    return state


def set_aside(checkpoint: Location) -> Location:
    """Renames a damaged checkpoint to `damaged-<name>`, for inspection. Returns its new path."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if isinstance(checkpoint, UrlPath) and isinstance(aside, UrlPath):
        aside.remove_tree()
        checkpoint.copy_tree(aside)
        remove_remote(checkpoint)
    elif isinstance(aside, Path):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)  # type: ignore[arg-type]  # both are local
    return aside


def remove_remote(checkpoint: UrlPath) -> None:
    """Removes a checkpoint in an object store. It does not count any more when its first file is gone."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    checkpoint.remove_tree()


def _sha256(path: Location) -> str:
    if isinstance(path, UrlPath):
        digest, size = hashlib.sha256(), path.stat().st_size
        for offset in range(0, size, CHUNK):
            digest.update(path.read_range(offset, min(CHUNK, size - offset)))
        return digest.hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
