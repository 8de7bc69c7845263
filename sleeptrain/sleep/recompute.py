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

from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sleeptrain.model.state import FastWeights, Recurrent, Retained

for _kind in (FastWeights, Recurrent, Retained):
    register_dataclass(_kind)

MODES = ("none", "block", "pass", "window")


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, of which only the arguments are kept for the backward.

    The tensors inside states and features are handed over one by one: an outer recomputation drops those that it sees.
    """
    leaves, structure = tree_flatten(arguments)

    def run(*leaves: Any) -> Any:
        return function(*tree_unflatten(leaves, structure))

    # Nothing in a pass draws random numbers, so the generator's state need not be kept.
    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)


def _plain(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class Recompute:
    """How windows, passes and blocks are called under a mode (one of `MODES`)."""

    def __init__(self, mode: str):
        self.window = _recomputed if mode == "window" else _plain
        self.round = _recomputed if mode in ("pass", "window") else _plain
        self.block = _recomputed if mode == "block" else None
