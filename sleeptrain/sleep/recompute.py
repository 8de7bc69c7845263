"""Recomputation: which tensors of a forward are saved for its backward, and what runs again to rebuild the others.

| mode   | saved for the backward                                    | run again              |
|--------|-----------------------------------------------------------|------------------------|
| none   | all activations                                           | nothing                |
| block  | the input of each block in each round                     | one block at a time    |
| pass   | features and state at each round's border                 | one round at a time    |
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
    """`function(*arguments)`; only the arguments are saved for the backward.

    The tensors inside states and features are passed to `checkpoint` as single arguments: an outer recomputation frees
    only tensors that it sees.
    """
    leaves, structure = tree_flatten(arguments)

    def run(*leaves: Any) -> Any:
        return function(*tree_unflatten(leaves, structure))

    # No pass draws random numbers, so the generator's state need not be saved.
    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)


def _plain(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class Recompute:
    """The functions that call windows, rounds and blocks in a mode (one of `MODES`)."""

    def __init__(self, mode: str):
        self.window = _recomputed if mode == "window" else _plain
        self.round = _recomputed if mode in ("pass", "window") else _plain
        self.block = _recomputed if mode == "block" else None
