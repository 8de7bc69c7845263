"""The method: windows in order, each woken and put to sleep, only the fast weights crossing from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._pytree import register_dataclass

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.layout import Layout, first_of_document, sleep_layout, window_layout
from sleeptrain.model.state import HARD, Boundary, FastWeights, Retained
from sleeptrain.sleep.recompute import Recompute
from sleeptrain.sleep.rounds import Round, windows_of

# Called with the logits [N, V] and targets [N] of a round that predicts.
ReadLogits = Callable[[Round, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class LoopSettings:
    """How rounds are run.

    core: the blocks [first, last) that sleep passes repeat. boundary: what crosses it besides S. recompute: what is
    kept for the backward. on_round: told of each round before it runs (under recomputation also when it is run again).
    """

    core: tuple[int, int]
    boundary: Boundary = HARD
    recompute: Recompute = field(default_factory=lambda: Recompute("none"))
    on_round: Callable[[Round], None] | None = None


@dataclass(frozen=True)
class Features:
    """Features [R, L, D] of some rows, with the core's input, which passes without feedback read again."""

    rows: tuple[int, ...]
    core_input_RLD: torch.Tensor | None
    output_RLD: torch.Tensor | None


register_dataclass(Features)


@dataclass(frozen=True)
class RoundInputs:
    """What a round reads besides features and state, on the model's device.

    tokens_RL: int64. target_index_N: positions in the flattened [R * L] that have a target (None: all); targets_N.
    rows_R: the rows' indices, None when all rows of the batch take part.
    """

    tokens_RL: torch.Tensor
    layout: Layout
    targets_N: torch.Tensor
    target_index_N: torch.Tensor | None
    rows_R: torch.Tensor | None


def run_rounds(
    model: Hybrid,
    batch: Batch,
    rounds: Sequence[Round],
    state: FastWeights,
    settings: LoopSettings,
    read_logits: ReadLogits | None = None,
) -> tuple[dict[int, torch.Tensor], FastWeights]:
    """Runs planned rounds of one batch in order.

    batch: on the CPU. state: the memory before the first of these rounds. Returns the summed cross entropy (a scalar in
    fp32 or wider, nats) of each window that predicts, and the memory after the last round, both with their gradients.
    """
    starts_BT = first_of_document(batch.documents_BT)
    num_rows = batch.tokens_BT.shape[0]
    losses: dict[int, torch.Tensor] = {}
    for group in windows_of(rounds):
        inputs = [round_inputs(batch, starts_BT, r, model.head_weight.device) for r in group]
        loss, state = settings.recompute.window(
            run_window, model, num_rows, group, inputs, state, settings, read_logits
        )
        if loss is not None:
            losses[group[0].window] = loss
    return losses, state


def run_window(
    model: Hybrid,
    num_rows: int,
    rounds: Sequence[Round],
    inputs: Sequence[RoundInputs],
    boundary_state: FastWeights,
    settings: LoopSettings,
    read_logits: ReadLogits | None,
) -> tuple[torch.Tensor | None, FastWeights]:
    """All rounds of one window. Prelude and coda write their state once, the coda from the last pass's features."""
    state, features, loss = boundary_state, list[Features](), None
    for r, given in zip(rounds, inputs, strict=True):
        own, at_start = state, boundary_state
        if given.rows_R is not None:
            own, at_start = state.rows(given.rows_R), boundary_state.rows(given.rows_R)
        source = None if r.is_wake else _select(features, r.rows)
        output, after, round_loss = settings.recompute.round(
            run_round, model, r, given, source, own, at_start, settings, read_logits
        )
        state = after if given.rows_R is None else state.put_rows(given.rows_R, after, num_rows)
        features = [*features, output] if r.is_wake else [output]
        if round_loss is not None:
            loss = round_loss if loss is None else loss + round_loss
    return loss, state


def run_round(
    model: Hybrid,
    r: Round,
    given: RoundInputs,
    source: Features | None,
    state: FastWeights,
    boundary_state: FastWeights,
    settings: LoopSettings,
    read_logits: ReadLogits | None = None,
) -> tuple[Features, FastWeights, torch.Tensor | None]:
    """One pass of one window over its rows: features and state in, features, state and summed loss out.

    boundary_state: the memory at the window's start. Core recurrences go on from the pass before; the coda and the
    caches of sliding eviction read what they had at the window's start, because they are written once a window.
    """
    first, last = settings.core
    if settings.on_round is not None:
        settings.on_round(r)
    run = partial(model.run, layout=given.layout, run_block=settings.recompute.block)
    # Sleep passes restart the core's convolutions: what they read is not the continuation of the window before.
    across = settings.boundary if r.is_wake else replace(settings.boundary, carry_conv=False)
    s = _readable(state, boundary_state, last)
    if source is None:
        core_input, s = run(model.embed(given.tokens_RL), s, first=0, last=first, boundary=across)
    else:
        core_input = source.output_RLD if r.feeds_back else source.core_input_RLD
    has_coda = r.coda and last < model.num_layers
    state_only = r.state_only and not has_coda
    output, s = run(core_input, s, first=first, last=last, boundary=across, state_only=state_only)
    top = output
    if has_coda:
        coda = partial(run, first=last, last=model.num_layers, boundary=settings.boundary)
        top, s = coda(output, s, state_only=r.state_only)
    loss = _loss(model, top, r, given, read_logits) if r.loss and top is not None else None
    begin, end = 0 if r.is_wake else first, model.num_layers if r.coda else last
    return Features(r.rows, core_input, output), state.replace(begin, s.layers[begin:end]), loss


def _readable(state: FastWeights, boundary_state: FastWeights, coda: int) -> FastWeights:
    """The state with coda and retained caches as they were at the window's start."""
    return FastWeights(
        tuple(
            old if layer >= coda or isinstance(new, Retained) else new
            for layer, (new, old) in enumerate(zip(state.layers, boundary_state.layers, strict=True))
        )
    )


def _loss(
    model: Hybrid, x_RLD: torch.Tensor, r: Round, given: RoundInputs, read_logits: ReadLogits | None
) -> torch.Tensor:
    """Summed cross entropy over the targets; the head is run only where there is one."""
    x_ND = x_RLD.flatten(0, 1)
    if given.target_index_N is not None:
        x_ND = x_ND.index_select(0, given.target_index_N)
    logits = model.logits(x_ND)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if read_logits is not None:
        read_logits(r, logits, given.targets_N)
    return F.cross_entropy(logits, given.targets_N, reduction="sum")


def round_inputs(batch: Batch, starts_BT: torch.Tensor, r: Round, device: torch.device) -> RoundInputs:
    """Cuts a round's tokens, targets and layout out of the batch, on the CPU, and moves them to the device."""
    everyone = len(r.rows) == batch.tokens_BT.shape[0]
    rows = torch.tensor(r.rows)

    def cut(t: torch.Tensor) -> torch.Tensor:
        part = t[:, r.start : r.stop]
        return part if everyone else part.index_select(0, rows)

    documents = cut(batch.documents_BT)
    layout = window_layout(documents, cut(starts_BT)) if r.is_wake else sleep_layout(documents)
    targets = cut(batch.targets_BT).flatten()
    wanted = targets != IGNORE
    index = None if bool(wanted.all()) else wanted.nonzero().squeeze(1)
    return RoundInputs(
        tokens_RL=cut(batch.tokens_BT).to(device),
        layout=layout.to(device),
        targets_N=(targets if index is None else targets[index]).to(device),
        target_index_N=None if index is None else index.to(device),
        rows_R=None if everyone else rows.to(device),
    )


def _select(features: Sequence[Features], rows: tuple[int, ...]) -> Features:
    """The features of `rows`, gathered from those that the rounds before left."""
    if len(features) == 1 and features[0].rows == rows:
        return features[0]
    have = [b for part in features for b in part.rows]
    place = {b: i for i, b in enumerate(have)}
    core_inputs = torch.cat([part.core_input_RLD for part in features if part.core_input_RLD is not None])
    outputs = torch.cat([part.output_RLD for part in features if part.output_RLD is not None])
    index = torch.tensor([place[b] for b in rows], device=outputs.device)
    return Features(rows, core_inputs.index_select(0, index), outputs.index_select(0, index))


def loop_settings(config: Config, window: int, num_layers: int, recompute: str | None = None) -> LoopSettings:
    """The settings of a loop over windows of this length; `recompute` overrides the configured mode."""
    first, last = config.sleep.core or (0, num_layers)
    boundary = Boundary(
        sliding_window=window if config.sleep.eviction == "sliding" else None,
        carry_conv=config.sleep.conv_state == "carry",
    )
    return LoopSettings((first, last), boundary, Recompute(recompute or config.sleep.recompute))
