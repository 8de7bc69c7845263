"""Recomputation: which tensors of a forward are saved for its backward, and what runs again to rebuild the others.

| mode      | saved for the backward                                    | run again                        |
|-----------|-----------------------------------------------------------|----------------------------------|
| none      | all activations                                           | nothing                          |
| selective | the input, products and attention of each block           | the rest of one block at a time  |
| block     | the input of each block in each round                     | one block at a time              |
| pass      | features and state at each round's border                 | one round at a time              |
| window    | state at each window's border; inside one window, as pass | a window, then a round           |

The loss reads the features at the targets, which all modes keep: it is no part of a round that runs again. In `pass`
and `window` it computes its logits again in the backward; the other modes keep them (`keeps_logits` of the model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, noop_context_fn

from sleeptrain.config.schema import Config
from sleeptrain.model.compiled import CompiledForward
from sleeptrain.model.state import FastWeights, Recurrent, Retained
from sleeptrain.sleep.selective import Contexts, selective_contexts

for _kind in (FastWeights, Recurrent, Retained):
    register_dataclass(_kind)

MODES = ("none", "selective", "block", "pass", "window")
# The value of `sleep.recompute` that stands for one of them at each time of a run (`sleeptrain.plan.recompute`).
AUTO = "auto"


def with_recompute(config: Config, mode: str) -> Config:
    """The configuration with this value of `sleep.recompute`."""
    return replace(config, sleep=replace(config.sleep, recompute=mode))


def _recomputed(
    function: Callable[..., Any], *arguments: Any, contexts: Callable[[], Contexts] = noop_context_fn
) -> Any:
    """`function(*arguments)`; only the arguments are saved for the backward, and what `contexts` keep.

    The tensors inside states and features are passed to `checkpoint` as single arguments: an outer recomputation frees
    only tensors that it sees.
    """
    leaves, structure = tree_flatten(arguments)

    def run(*leaves: Any) -> Any:
        return function(*tree_unflatten(leaves, structure))

    # No pass draws random numbers, so the generator's state need not be saved.
    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _selected(block: Callable[..., Any], *arguments: Any) -> Any:
    """`block(*arguments)`; the arguments and the block's dear results are saved for the backward.

    A compiled block is compiled with its checkpoint: the policy does not see inside compiled code.
    """
    forward = getattr(block, "forward", None)
    if not isinstance(forward, CompiledForward):
        return _keeping_dear(block, *arguments)
    with forward.compiled_in(_keeping_dear):
        return block(*arguments)


def _keeping_dear(function: Callable[..., Any], *arguments: Any) -> Any:
    return _recomputed(function, *arguments, contexts=selective_contexts)


def _plain(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class Recompute:
    """The functions that call windows, rounds and blocks in a mode (one of `MODES`).

    keeps_logits: losses keep their logits for the backward. block: calls a block with its arguments; None: it is called
    directly. Raises ValueError for another mode, `AUTO` included.
    """

    def __init__(self, mode: str):
        if mode not in MODES:
            raise ValueError(f"recompute mode {mode!r} is none of {', '.join(MODES)}")
        rounds = mode in ("pass", "window")
        self.window = _recomputed if mode == "window" else _plain
        self.round = _recomputed if rounds else _plain
        self.keeps_logits = not rounds
        blocks: dict[str, Callable[..., Any]] = {"block": _recomputed, "selective": _selected}
        self.block = blocks.get(mode)
