"""Which checkpoints stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sleeptrain.checkpoint.folder import checkpoints, step_of
from sleeptrain.files import beside


def superfluous(steps: Sequence[int], keep: int, keep_every: int) -> list[int]:
    """Of these steps, oldest first, those that go: all but the newest `keep` and the multiples of `keep_every`."""
    return [step for step in steps[:-keep] if keep_every == 0 or step % keep_every]


def remove_superfluous(folder: Path, keep: int, keep_every: int) -> None:
    """Removes checkpoints, each under a hidden name, so that a kill leaves none in part."""
    found = {step_of(path): path for path in checkpoints(folder)}
    for step in superfluous(sorted(found), keep, keep_every):
        hidden = beside(found[step], "old")
        os.rename(found[step], hidden)
        shutil.rmtree(hidden)
