"""Reading token by token: windows in progress, with sleep passes over each window when it is full.

Blocks, sleep passes and boundaries are those of `loop.py`. Here the wake pass over a window may be split into pieces,
and every row of a batch has its own position in its own window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout, continued_layout, sleep_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.state import FastWeights, LayerState, Recurrent, Retained, WindowKV
from sleeptrain.sleep.features import Features
from sleeptrain.sleep.inputs import RoundInputs
from sleeptrain.sleep.loop import LoopSettings, RoundContext, loop_settings, run_layers, run_on_rows
from sleeptrain.sleep.rounds import Round, WindowFacts, plan_rounds
from sleeptrain.sleep.stop_gate import StopGate
from sleeptrain.sleep.stop_rule import Passed, StopRule, pooled, stop_rule
from sleeptrain.sleep.until_stopped import StoppedLoop

T = TypeVar("T")


@dataclass(frozen=True)
class Live:
    """The state of B rows, one document each, while they are read. Its size does not grow with the tokens read.

    state: S and, inside the window, the convolutions' last inputs and the keys and values.
    at_start: the parts of the memory at the window's start that sleep passes read: the coda's state, and retained keys
        and values; where a stop rule reads the change of S, S of all layers.
    fed_back_BLD: the input of the first sleep pass, with a slot for each token of the window; None before the first
        token.
    step_BLD: the core's output minus its input in the wake pass, with a slot for each token of the window; None unless
        a stop rule reads it.
    filled: the number of tokens in each row's window, less than L.
    predicted: True for rows with a token in the window that predicts.
    boundaries: the number of windows that each row has finished.
    passes: the passes that each row took in its last finished window; 0 before the first.

    `read` writes `state` and `fed_back_BLD` in place, so a value can be continued only once; `rows` makes a copy.
    """

    state: FastWeights
    at_start: FastWeights
    fed_back_BLD: torch.Tensor | None
    filled: tuple[int, ...]
    predicted: tuple[bool, ...]
    boundaries: tuple[int, ...]
    passes: tuple[int, ...]
    step_BLD: torch.Tensor | None = None

    def rows(self, rows: Sequence[int]) -> Live:
        """A copy of these rows, in this order; a row may be taken several times."""
        device = None if self.fed_back_BLD is None else self.fed_back_BLD.device
        rows_R = torch.tensor(rows, device=device)

        def pick(values: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(values[row] for row in rows)

        return Live(
            self.state.rows(rows_R),
            self.at_start.rows(rows_R),
            None if self.fed_back_BLD is None else self.fed_back_BLD.index_select(0, rows_R),
            pick(self.filled),
            pick(self.predicted),
            pick(self.boundaries),
            pick(self.passes),
            None if self.step_BLD is None else self.step_BLD.index_select(0, rows_R),
        )


def begin(model: Hybrid, num_rows: int) -> Live:
    """Rows that have read nothing."""
    empty = model.empty_state()
    return Live(empty, empty, None, (0,) * num_rows, (False,) * num_rows, (0,) * num_rows, (0,) * num_rows)


@torch.no_grad()
def read(
    model: Hybrid,
    live: Live,
    tokens_BM: torch.Tensor,
    counts: Sequence[int],
    predicts: Sequence[bool],
    sleep: SleepConfig,
    gate: StopGate | None = None,
) -> tuple[torch.Tensor, Live]:
    """The wake pass over the next counts[b] tokens of each row, at most to its window's end; full windows sleep.

    tokens_BM: int64 on the model's device; rows with fewer tokens are padded on the right with any id.
    predicts: True for rows whose logits the caller reads; under `sleep.when=unlabelled` their windows get one pass.
    sleep: passes, window, when, feedback, eviction, conv_state, core and the stop rule are read. Only `passes` and
        `stop_threshold` may differ from those of earlier calls.
    gate: that of `sleep.stop=gate`, which may differ, too; None takes the file `sleep.stop_gate`.
    Returns the features [B, M, D] that the head reads, and the new state of the rows.
    """
    settings = loop_settings(sleep, sleep.window, model.num_layers, "none")
    sliding = settings.boundary.sliding_window is not None
    layout = continued_layout(
        live.filled, counts, sleep.window, [n > 0 for n in live.boundaries] if sliding else None, tokens_BM.device
    )
    # Inside a window the convolutions always continue. `_cross` handles boundaries.
    continuing = replace(settings, boundary=replace(settings.boundary, carry_conv=True))
    features, x_BMD, state = run_layers(
        RoundContext(model, continuing),
        Round(0, 0, sleep.window, 1, tuple(range(len(counts))), loss=True, coda=True),
        _inputs(tokens_BM, layout),
        None,
        live.state,
        live.state,
    )
    new = features.output_RLD if sleep.feedback == "features" else features.core_input_RLD
    assert x_BMD is not None and new is not None and layout.place is not None
    fed_back = _put(live.fed_back_BLD, new, layout, sleep.window)
    step = live.step_BLD
    if sleep.stop == "acceleration":
        assert features.output_RLD is not None and features.core_input_RLD is not None
        step = _put(step, features.output_RLD - features.core_input_RLD, layout, sleep.window)
    filled = tuple(f + n for f, n in zip(live.filled, counts, strict=True))
    predicted = tuple(p or q for p, q in zip(live.predicted, predicts, strict=True))
    live = Live(state, live.at_start, fed_back, filled, predicted, live.boundaries, live.passes, step)
    full = [b for b, f in enumerate(filled) if f == sleep.window]
    if not full:
        return x_BMD, live
    return x_BMD, _cross(model, live, full, settings, sleep, stop_rule(sleep, settings.core, gate))


def _put(buffer_BLD: torch.Tensor | None, x_BMD: torch.Tensor, layout: DocumentLayout, window: int) -> torch.Tensor:
    """The buffer of the window, with the tokens' values written into their slots in place."""
    if buffer_BLD is None:
        buffer_BLD = x_BMD.new_zeros(x_BMD.shape[0], window, x_BMD.shape[2])
    assert layout.place is not None
    layout.place.put(buffer_BLD, x_BMD)
    return buffer_BLD


def _inputs(tokens_RL: torch.Tensor, layout: DocumentLayout) -> RoundInputs:
    return RoundInputs(tokens_RL, layout, tokens_RL.new_empty(0))


def _cross(
    model: Hybrid, live: Live, full: list[int], settings: LoopSettings, sleep: SleepConfig, rule: StopRule | None
) -> Live:
    """Runs the sleep passes of full windows that sleep, and begins the next windows of their rows."""
    assert live.fed_back_BLD is not None
    device, num_rows = live.fed_back_BLD.device, len(live.filled)
    full_R = torch.tensor(full, device=device)
    states_R = _end_windows(model, live.state, full_R, settings)
    sleeping = [i for i, b in enumerate(full) if sleep.when == "every" or not live.predicted[b]]
    passes = dict.fromkeys(full, 1)
    if sleep.passes > 1 and sleeping:
        part_R = torch.tensor(sleeping, device=device)
        rows = replace(live, state=model.empty_state()).rows([full[i] for i in sleeping])
        slept, taken = _sleep(model, rows, states_R.rows(part_R), settings, sleep, rule)
        passes |= {full[i]: n for i, n in zip(sleeping, taken, strict=True)}
        states_R = slept if len(sleeping) == len(full) else states_R.put_rows(part_R, slept, len(full))
    is_full = [b in passes for b in range(num_rows)]
    needed = _needed_at_start(states_R, settings.core[1], sleep.stop in ("change", "gate"))
    return Live(
        _begin_windows(model, live.state, full_R, states_R, settings),
        live.at_start.put_rows(full_R, needed, num_rows),
        live.fed_back_BLD,
        tuple(0 if begins else f for f, begins in zip(live.filled, is_full, strict=True)),
        tuple(p and not begins for p, begins in zip(live.predicted, is_full, strict=True)),
        tuple(n + begins for n, begins in zip(live.boundaries, is_full, strict=True)),
        tuple(passes.get(b, n) for b, n in enumerate(live.passes)),
        live.step_BLD,
    )


def _sleep(
    model: Hybrid,
    live: Live,
    state: FastWeights,
    settings: LoopSettings,
    sleep: SleepConfig,
    rule: StopRule | None,
) -> tuple[FastWeights, list[int]]:
    """The memory of R rows after passes 2..N over their full windows, and the passes that each row took.

    live: these rows, without `state`. state: their memory after the wake pass.
    """
    assert live.fed_back_BLD is not None
    num_rows, window, device = len(live.filled), sleep.window, live.fed_back_BLD.device
    facts = WindowFacts(0, window, (False,) * num_rows, (True,) * num_rows)
    rounds = [r for r in plan_rounds([facts], sleep.passes, "every", sleep.feedback) if not r.is_wake]

    def inputs_of(r: Round) -> RoundInputs:
        layout = sleep_layout(torch.zeros(len(r.rows), window, dtype=torch.long, device=device))
        rows_R = None if len(r.rows) == num_rows else torch.tensor(r.rows, device=device)
        return replace(_inputs(layout.documents_RL, layout), rows_R=rows_R)

    context = RoundContext(model, settings)
    # Without feedback each pass reads the core's input in the wake pass, else the output of the previous pass.
    features = [Features(rounds[0].rows, live.fed_back_BLD, live.fed_back_BLD)]
    if rule is not None:
        step = live.fed_back_BLD if live.step_BLD is None else live.step_BLD
        mean_RD = pooled(live.fed_back_BLD, None)
        passed, passes = Passed(1, step, mean_RD, live.at_start, state), [1] * num_rows
        loop = StoppedLoop(context, num_rows, inputs_of, rule)
        return loop.sleep(rounds, features, passed, state, live.at_start, passes), passes
    for r in rounds:
        output, state, _ = run_on_rows(context, num_rows, r, inputs_of(r), features, state, live.at_start)
        features = [output]
    return state, [sleep.passes] * num_rows


def _end_windows(model: Hybrid, state: FastWeights, full_R: torch.Tensor, settings: LoopSettings) -> FastWeights:
    """The memory of the rows `full_R` after the wake pass over a whole window."""

    def ended(layer: int, old: LayerState) -> LayerState:
        if isinstance(old, WindowKV):
            return None if settings.boundary.sliding_window is None else _attention(model, layer).retained(old, full_R)
        assert isinstance(old, Recurrent)
        conv = old.conv_BWD if settings.boundary.carry_conv else None
        conv = None if conv is None else conv.index_select(0, full_R)
        return Recurrent(old.S_BHKV.index_select(0, full_R), conv)

    return FastWeights(tuple(ended(i, s) for i, s in enumerate(state.layers)))


def _begin_windows(
    model: Hybrid, state: FastWeights, full_R: torch.Tensor, ended: FastWeights, settings: LoopSettings
) -> FastWeights:
    """The state of all rows, in which the rows `full_R` begin a window with the memory `ended` of the previous one."""

    def begun(layer: int, old: LayerState, end_state: LayerState) -> LayerState:
        if isinstance(end_state, Retained):
            assert isinstance(old, WindowKV)
            _attention(model, layer).put_before(old, full_R, end_state)
        if isinstance(old, WindowKV):
            return old
        assert isinstance(old, Recurrent) and isinstance(end_state, Recurrent)
        S = old.S_BHKV.index_copy(0, full_R, end_state.S_BHKV)
        if old.conv_BWD is None:
            return Recurrent(S)
        if settings.boundary.carry_conv:
            assert end_state.conv_BWD is not None
            return Recurrent(S, old.conv_BWD.index_copy(0, full_R, end_state.conv_BWD))
        return Recurrent(S, old.conv_BWD.index_fill(0, full_R, 0))

    pairs = zip(state.layers, ended.layers, strict=True)
    return FastWeights(tuple(begun(i, old, end_state) for i, (old, end_state) in enumerate(pairs)))


def _needed_at_start(state: FastWeights, coda: int, all_S: bool) -> FastWeights:
    """The parts of the memory at a window's start that its sleep passes read: retained caches, and the coda's state.

    all_S: a stop rule reads the change of S in the wake pass.
    """

    def needed(layer: int, s: LayerState) -> LayerState:
        if layer >= coda or isinstance(s, Retained):
            return s
        return Recurrent(s.S_BHKV) if all_S and isinstance(s, Recurrent) else None

    return FastWeights(tuple(needed(layer, s) for layer, s in enumerate(state.layers)))


def _attention(model: Hybrid, layer: int) -> Attention:
    return cast(Attention, cast(Block, model.blocks[layer]).mixer)
