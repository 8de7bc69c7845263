"""Which checkpoints stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.checkpoint.folder import checkpoints, find_damage, point_to, step_folder, step_of
from sleeptrain.files import beside


def superfluous(steps: Sequence[int], keep: int, keep_every: int, reach: int = 0) -> list[int]:
    """Of these steps, oldest first, those that go: all but the newest `keep` and the multiples of `keep_every`.

    reach: those of so many steps behind the last one stay too, and the newest from before, so that there always is one
    as far behind; 0: none need to.
    """
    behind = max((step for step in steps if step <= steps[-1] - reach), default=0)
    return [step for step in steps[:-keep] if step < behind and (keep_every == 0 or step % keep_every)]


def remove_superfluous(folder: Path, keep: int, keep_every: int, reach: int = 0) -> None:
    """Those whose files are not all there do not count, so that none that is whole gives way to them; they stay."""
    found = {step_of(path): path for path in checkpoints(folder) if find_damage(path, tensors=False) is None}
    _remove([found[step] for step in superfluous(sorted(found), keep, keep_every, reach)])


def remove_after(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps than `step`, of which there is one."""
    point_to(step_folder(folder, step))  # first: a pointer to one that is gone tells of a loss
    _remove([path for path in checkpoints(folder) if step_of(path) > step])


def _remove(paths: Sequence[Path]) -> None:
    """Each under a hidden name, so that a kill leaves none in part."""
    for path in paths:
        hidden = beside(path, "old")
        os.rename(path, hidden)
        shutil.rmtree(hidden)
