"""What is kept of a forward until its backward: everything, or less, rebuilt when it is needed.

| mode   | kept until the backward                                  | run again            |
|--------|----------------------------------------------------------|----------------------|
| none   | all activations                                          | nothing              |
| block  | the input of each block in each round                    | one block at a time  |
| pass   | features and state at each round's border                | one round at a time  |
| window | state at each window's border; inside one window, as pass | a window, then a round |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

MODES = ("none", "block", "pass", "window")


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    # Nothing in a pass draws random numbers, so the generator's state need not be kept.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _plain(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class Recompute:
    """How windows, passes and blocks are called under a mode (one of `MODES`)."""

    def __init__(self, mode: str):
        self.window = _recomputed if mode == "window" else _plain
        self.round = _recomputed if mode in ("pass", "window") else _plain
        self.block = _recomputed if mode == "block" else None
