"""Which checkpoints are kept, and the removal of the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.checkpoint.folder import checkpoints, find_damage, point_to, remove_remote, step_folder, step_of
from sleeptrain.files import beside
from sleeptrain.remote import Location, UrlPath


def superfluous(steps: Sequence[int], keep: int, keep_every: int, reach: int = 0) -> list[int]:
    """The steps whose checkpoints are removed: all but the newest `keep` and the multiples of `keep_every`.

    steps: oldest first. reach: checkpoints of the last `reach` steps are kept too, and the newest one before them:
    there is always one at least `reach` steps old. 0: none are kept for this.
    """
    reach_start = max((step for step in steps if step <= steps[-1] - reach), default=0)
    return [step for step in steps[:-keep] if step < reach_start and (keep_every == 0 or step % keep_every)]


def remove_superfluous(folder: Location, keep: int, keep_every: int, reach: int = 0) -> None:
    """Removes superfluous checkpoints. Incomplete ones do not count and are not removed: they displace no whole one."""
    paths = {step_of(path): path for path in checkpoints(folder) if find_damage(path, tensors=False) is None}
    _remove([paths[step] for step in superfluous(sorted(paths), keep, keep_every, reach)])


def remove_after(folder: Location, step: int, pointer: Path | None = None) -> None:
    """Removes the checkpoints of steps after `step`. The checkpoint of `step` must exist. pointer: as in `write`."""
    point_to(step_folder(folder, step), pointer)  # first: a pointer to a missing checkpoint means a loss
    _remove([path for path in checkpoints(folder) if step_of(path) > step])


def _remove(paths: Sequence[Location]) -> None:
    """Removes checkpoints. On a disk each is renamed to a hidden name first: a kill leaves no part under its name."""
    for path in paths:
        if isinstance(path, UrlPath):
            remove_remote(path)
            continue
        hidden = beside(path, "old")
        os.rename(path, hidden)
        shutil.rmtree(hidden)
