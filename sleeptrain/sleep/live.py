"""Reading token by token: windows in progress, each put to sleep when it is full.

The blocks, the sleep passes and what crosses a boundary are those of `loop.py`; here a wake pass over a window may come
in pieces, and every row of a batch is at its own place in its own window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.layout import Layout, continued_layout, sleep_layout
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.state import FastWeights, LayerState, Recurrent, Retained, WindowKV
from sleeptrain.sleep.loop import (
    Features,
    LoopSettings,
    RoundContext,
    RoundInputs,
    loop_settings,
    run_layers,
    run_round,
)
from sleeptrain.sleep.rounds import Round, WindowFacts, plan_rounds

T = TypeVar("T")


@dataclass(frozen=True)
class Live:
    """What B rows, one document each, keep while they are read; none of it grows with what has been read.

    state: S and, inside the window, the convolutions' last inputs, keys and values. at_start: what is needed of the
    memory as it was at the window's start: that of the coda, and retained keys and values. fed_back_BLD: what the first
    sleep pass will read, in a slot for each token of the window; None before the first token. filled: tokens that each
    row's window holds, less than L. predicted: whether one of them has predicted. boundaries: windows behind each row.

    `state` and `fed_back_BLD` are written in place by whatever goes on from this value, which is then used up; `rows`
    gives a copy.
    """

    state: FastWeights
    at_start: FastWeights
    fed_back_BLD: torch.Tensor | None
    filled: tuple[int, ...]
    predicted: tuple[bool, ...]
    boundaries: tuple[int, ...]

    def rows(self, rows: Sequence[int]) -> Live:
        """A copy of these rows, in this order; a row may be taken several times."""
        device = None if self.fed_back_BLD is None else self.fed_back_BLD.device
        at = torch.tensor(rows, device=device)

        def pick(values: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(values[row] for row in rows)

        return Live(
            self.state.rows(at),
            self.at_start.rows(at),
            None if self.fed_back_BLD is None else self.fed_back_BLD.index_select(0, at),
            pick(self.filled),
            pick(self.predicted),
            pick(self.boundaries),
        )


def begin(model: Hybrid, num_rows: int) -> Live:
    """Rows that have read nothing."""
    empty = model.empty_state()
    return Live(empty, empty, None, (0,) * num_rows, (False,) * num_rows, (0,) * num_rows)


@torch.no_grad()
def read(
    model: Hybrid,
    live: Live,
    tokens_BM: torch.Tensor,
    counts: Sequence[int],
    predicts: Sequence[bool],
    sleep: SleepConfig,
) -> tuple[torch.Tensor, Live]:
    """The wake pass over the next counts[b] tokens of each row, at most to its window's end; full windows sleep.

    tokens_BM: int64 on the model's device, rows with fewer tokens padded on the right with any id. predicts: whether a
    row's logits are wanted; under `sleep.when=unlabelled` its window then gets one pass. sleep: passes, window, when,
    feedback, eviction, conv_state and core are read; all but `passes` must be those of the calls before. Returns the
    features [B, M, D] that the head reads, and what is kept.
    """
    settings = loop_settings(sleep, sleep.window, model.num_layers, "none")
    sliding = settings.boundary.sliding_window is not None
    layout = continued_layout(
        live.filled, counts, sleep.window, [n > 0 for n in live.boundaries] if sliding else None, tokens_BM.device
    )
    # Inside a window the convolutions always go on; what crosses a boundary is settled there.
    going_on = replace(settings, boundary=replace(settings.boundary, carry_conv=True))
    features, x_BMD, state = run_layers(
        RoundContext(model, going_on),
        Round(0, 0, sleep.window, 1, tuple(range(len(counts))), loss=True, coda=True),
        _inputs(tokens_BM, layout),
        None,
        live.state,
        live.state,
    )
    new = features.output_RLD if sleep.feedback == "features" else features.core_input_RLD
    assert x_BMD is not None and new is not None and layout.place is not None
    fed_back = live.fed_back_BLD
    if fed_back is None:
        fed_back = new.new_zeros(new.shape[0], sleep.window, new.shape[2])
    layout.place.put(fed_back, new)
    filled = tuple(f + n for f, n in zip(live.filled, counts, strict=True))
    predicted = tuple(p or q for p, q in zip(live.predicted, predicts, strict=True))
    live = Live(state, live.at_start, fed_back, filled, predicted, live.boundaries)
    full = [b for b, f in enumerate(filled) if f == sleep.window]
    return x_BMD, _cross(model, live, full, sleep, settings) if full else live


def _inputs(tokens_RL: torch.Tensor, layout: Layout) -> RoundInputs:
    return RoundInputs(tokens_RL, layout, tokens_RL.new_empty(0), None, None)


def _cross(model: Hybrid, live: Live, full: list[int], sleep: SleepConfig, settings: LoopSettings) -> Live:
    """The rows whose windows are full sleep where the method says so, and begin their next windows."""
    assert live.fed_back_BLD is not None
    device, num_rows = live.fed_back_BLD.device, len(live.filled)
    full_R = torch.tensor(full, device=device)
    ended = _end_windows(model, live.state, full_R, settings)
    sleeping = [i for i, b in enumerate(full) if sleep.when == "every" or not live.predicted[b]]
    if sleep.passes > 1 and sleeping:
        part = torch.tensor(sleeping, device=device)
        rows = full_R[part]
        at_start, fed_back = live.at_start.rows(rows), live.fed_back_BLD.index_select(0, rows)
        slept = _sleep(model, fed_back, ended.rows(part), at_start, sleep, settings)
        ended = slept if len(sleeping) == len(full) else ended.put_rows(part, slept, len(full))
    begins = [b in set(full) for b in range(num_rows)]
    return Live(
        _begin_windows(model, live.state, full_R, ended, settings),
        live.at_start.put_rows(full_R, _needed_at_start(ended, settings.core[1]), num_rows),
        live.fed_back_BLD,
        tuple(0 if new else f for f, new in zip(live.filled, begins, strict=True)),
        tuple(p and not new for p, new in zip(live.predicted, begins, strict=True)),
        tuple(n + new for n, new in zip(live.boundaries, begins, strict=True)),
    )


def _sleep(
    model: Hybrid,
    fed_back_RLD: torch.Tensor,
    state: FastWeights,
    at_start: FastWeights,
    sleep: SleepConfig,
    settings: LoopSettings,
) -> FastWeights:
    """Passes 2..N over full windows: the memory that they leave."""
    num_rows, window = fed_back_RLD.shape[:2]
    facts = WindowFacts(0, window, (False,) * num_rows, (True,) * num_rows)
    layout = sleep_layout(torch.zeros(num_rows, window, dtype=torch.long, device=fed_back_RLD.device))
    inputs, context = _inputs(layout.documents_RL, layout), RoundContext(model, settings)
    # Without feedback each pass reads what the core read in the wake pass, else what the pass before has left.
    features = Features(tuple(range(num_rows)), fed_back_RLD, fed_back_RLD)
    for r in plan_rounds([facts], sleep.passes, "every", sleep.feedback):
        if not r.is_wake:
            features, state, _ = run_round(context, r, inputs, features, state, at_start)
    return state


def _end_windows(model: Hybrid, state: FastWeights, full_R: torch.Tensor, settings: LoopSettings) -> FastWeights:
    """The memory of these rows as the wake pass over a whole window leaves it."""

    def ended(layer: int, own: LayerState) -> LayerState:
        if isinstance(own, WindowKV):
            return None if settings.boundary.sliding_window is None else _attention(model, layer).retained(own, full_R)
        assert isinstance(own, Recurrent)
        conv = own.conv_BWD if settings.boundary.carry_conv else None
        conv = None if conv is None else conv.index_select(0, full_R)
        return Recurrent(own.S_BHKV.index_select(0, full_R), conv)

    return FastWeights(tuple(ended(i, s) for i, s in enumerate(state.layers)))


def _begin_windows(
    model: Hybrid, state: FastWeights, full_R: torch.Tensor, ended: FastWeights, settings: LoopSettings
) -> FastWeights:
    """The state of all rows, in which these rows begin a window with what the one before has left."""

    def begun(layer: int, own: LayerState, left: LayerState) -> LayerState:
        if isinstance(left, Retained):
            assert isinstance(own, WindowKV)
            _attention(model, layer).put_before(own, full_R, left)
        if isinstance(own, WindowKV):
            return own
        assert isinstance(own, Recurrent) and isinstance(left, Recurrent)
        S = own.S_BHKV.index_copy(0, full_R, left.S_BHKV)
        if own.conv_BWD is None:
            return Recurrent(S)
        if settings.boundary.carry_conv:
            assert left.conv_BWD is not None
            return Recurrent(S, own.conv_BWD.index_copy(0, full_R, left.conv_BWD))
        return Recurrent(S, own.conv_BWD.index_fill(0, full_R, 0))

    pairs = zip(state.layers, ended.layers, strict=True)
    return FastWeights(tuple(begun(i, own, left) for i, (own, left) in enumerate(pairs)))


def _needed_at_start(state: FastWeights, coda: int) -> FastWeights:
    """What a window's sleep passes read of the memory before it: retained caches, and all of the coda."""
    return FastWeights(
        tuple(s if layer >= coda or isinstance(s, Retained) else None for layer, s in enumerate(state.layers))
    )


def _attention(model: Hybrid, layer: int) -> Attention:
    return cast(Attention, cast(Block, model.blocks[layer]).mixer)
