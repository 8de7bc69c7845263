"""Checkpoints of one process: everything a run is, in one file that appears whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from sleeptrain.errors import DataError
from sleeptrain.files import whole_file

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})\.pt")


def save_checkpoint(folder: Path, step: int, contents: dict[str, Any], keep: int) -> Path:
    """Writes `<folder>/step-<step>.pt` (temporary file, fsync, rename) and removes all but the newest `keep`.

    contents: nested dicts and lists of tensors and plain values only, so that loading executes no pickled code.
    """
    path = folder / f"step-{step:08d}.pt"
    with whole_file(path) as file:
        torch.save({"format": FORMAT_VERSION, **contents}, file)
    for old in checkpoints(folder)[:-keep] if keep > 0 else []:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Raises DataError when the file is damaged or of another format."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); remove it to go on from the one before"
        ) from error
    if contents.get("format") != FORMAT_VERSION:
        raise DataError(f"checkpoint {path} has format {contents.get('format')}, this version reads {FORMAT_VERSION}")
    return contents
