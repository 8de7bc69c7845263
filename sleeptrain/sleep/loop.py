"""The method: windows run in order, each with wake and sleep passes. Only fast weights cross into the next window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import SleepConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import HARD, Boundary, FastWeights, Retained
from sleeptrain.sleep.features import Features, select
from sleeptrain.sleep.inputs import RoundInputs, inputs_of_rounds
from sleeptrain.sleep.recompute import Recompute
from sleeptrain.sleep.round_layouts import RoundLayouts, carried_documents
from sleeptrain.sleep.rounds import Round, round_layers, windows_of

# Called with logits [n, V] and targets [n] of a round that predicts, and with the index of the first among the round's
# targets; with all of them at once, or with some at a time, in order (`MOST_LOGITS`).
ReadLogits = Callable[[Round, int, torch.Tensor, torch.Tensor], None]
# Called with the features [R, L, D] that the core leaves in a round.
OnFeatures = Callable[[Round, DocumentLayout, torch.Tensor], None]
# Calls `run_layers`, which is its first argument, with the others.
CallLayers = Callable[..., tuple[Features, torch.Tensor | None, FastWeights]]


@dataclass(frozen=True)
class LoopSettings:
    """How rounds are run.

    core: the blocks [first, last) that sleep passes repeat.
    boundary: what crosses an eviction boundary besides S.
    recompute: the recomputation mode.
    on_round: called with each round before it runs, before it runs again, and when its backward begins.
    on_features: called with the core's output in each round, also when the round runs again.
    graphs: runs the layers of each round, as CUDA graphs where it can; layouts then have fixed sizes. None: they are
        called directly.
    """

    core: tuple[int, int]
    boundary: Boundary = HARD
    recompute: Recompute = field(default_factory=lambda: Recompute("none"))
    on_round: Callable[[Round], None] | None = None
    on_features: OnFeatures | None = None
    graphs: CallLayers | None = None


@dataclass(frozen=True)
class RoundContext:
    """The arguments that all rounds of a batch share.

    model: the whole model, or the part that this process holds.
    settings: how rounds are run.
    read_logits: called with the logits of each round that predicts.
    """

    model: Hybrid
    settings: LoopSettings
    read_logits: ReadLogits | None = None


def run_rounds(
    model: Hybrid,
    batch: Batch,
    rounds: Sequence[Round],
    state: FastWeights,
    settings: LoopSettings,
    read_logits: ReadLogits | None = None,
    retained_BC: torch.Tensor | None = None,
) -> tuple[dict[int, torch.Tensor], FastWeights]:
    """Runs planned rounds of one batch in order.

    batch: on the CPU. state: the memory before the first round. retained_BC: its `retained_documents`, if they are
    known; otherwise they are read here. Returns {window: summed cross entropy} for the windows that predict (scalars in
    nats, fp32 or wider) and the memory after the last round, both with gradients.
    """
    context = RoundContext(model, settings, read_logits)
    num_rows = batch.tokens_BT.shape[0]
    if retained_BC is None:
        retained_BC = carried_documents(rounds, state)
    fixed_sizes = settings.graphs is not None
    layouts = RoundLayouts(batch, model, settings.boundary.sliding_window, retained_BC, fixed_sizes)
    inputs = inputs_of_rounds(batch, rounds, layouts, model.device)
    losses: dict[int, torch.Tensor] = {}
    for group in windows_of(rounds):
        of_group, inputs = inputs[: len(group)], inputs[len(group) :]
        predicting, state = settings.recompute.window(run_window, context, num_rows, group, of_group, state)
        for index, x_ND in predicting.items():
            loss, window = window_loss(context, x_ND, group[index], of_group[index]), group[0].window
            losses[window] = losses[window] + loss if window in losses else loss
    return losses, state


def window_loss(context: RoundContext, x_ND: torch.Tensor, r: Round, inputs: RoundInputs) -> torch.Tensor:
    """The loss of a round, outside the round's recomputation."""
    settings = context.settings
    if settings.on_round is not None:
        settings.on_round(r)
    loss = summed_loss(context, x_ND, r, inputs, settings.recompute.keeps_logits)
    if settings.on_round is not None:
        _call_before_backward(r, settings.on_round, x_ND, loss)
    return loss


def run_window(
    context: RoundContext,
    num_rows: int,
    rounds: Sequence[Round],
    inputs_of_rounds: Sequence[RoundInputs],
    boundary_state: FastWeights,
) -> tuple[dict[int, torch.Tensor], FastWeights]:
    """All rounds of one window. Prelude and coda write their state once; the coda reads the last pass's features.

    Returns {index: features [N, D] at the targets} for the rounds that predict, and the state.
    """
    state, previous, predicting = boundary_state, list[Features](), dict[int, torch.Tensor]()
    current, pass_index = list[Features](), 1
    for index, (r, inputs) in enumerate(zip(rounds, inputs_of_rounds, strict=True)):
        if r.pass_index != pass_index:
            previous, current, pass_index = current, [], r.pass_index
        output, state, x_ND = run_on_rows(context, num_rows, r, inputs, previous, state, boundary_state)
        current.append(output)
        if x_ND is not None:
            predicting[index] = x_ND
    return predicting, state


def run_on_rows(
    context: RoundContext,
    num_rows: int,
    r: Round,
    inputs: RoundInputs,
    previous: Sequence[Features],
    state: FastWeights,
    boundary_state: FastWeights,
) -> tuple[Features, FastWeights, torch.Tensor | None]:
    """`run_round` on the round's rows of a state of `num_rows` rows.

    previous: the features of the rounds of the previous pass, which hold all rows of this round.
    """
    row_state, at_start = state, boundary_state
    if inputs.rows_R is not None:
        row_state, at_start = state.rows(inputs.rows_R), boundary_state.rows(inputs.rows_R)
    source = None if r.is_wake else select(previous, r.rows, inputs)
    recompute = context.settings.recompute
    output, new_state, x_ND = recompute.round(run_round, context, r, inputs, source, row_state, at_start)
    state = new_state if inputs.rows_R is None else state.put_rows(inputs.rows_R, new_state, num_rows)
    return output, state, x_ND


def run_round(
    context: RoundContext,
    r: Round,
    inputs: RoundInputs,
    source: Features | None,
    state: FastWeights,
    boundary_state: FastWeights,
) -> tuple[Features, FastWeights, torch.Tensor | None]:
    """Runs one pass over one window: features and state -> (features, state, features [N, D] at the targets or None).

    source: the features of the previous pass; None in a wake pass.
    boundary_state: the memory at the window's start. Recurrences of the core continue from the previous pass. The coda
        and the caches of sliding eviction are written once per window, so they read the state at the window's start.
    """
    on_round = context.settings.on_round
    if on_round is not None:
        on_round(r)
    x = None
    if source is not None:
        x = source.output_RLD if r.feeds_back else source.core_input_RLD
    if r.detached:
        state = state.detach(range(*context.settings.core))
        x = x.detach() if r.feeds_back and x is not None else x
    read = (source, state, boundary_state)
    arguments = (context, r, inputs, x, state, boundary_state)
    graphs = context.settings.graphs
    features, output, state = run_layers(*arguments) if graphs is None else graphs(run_layers, *arguments)
    x_ND = at_targets(output, inputs) if r.loss and output is not None else None
    if on_round is not None:
        _call_before_backward(r, on_round, read, (features, state, x_ND))
    return features, state, x_ND


def _call_before_backward(r: Round, on_round: Callable[[Round], None], read: object, outputs: object) -> None:
    """Calls `on_round` again when a gradient reaches an output of the round. Outputs that are inputs do not count.

    Autograd runs in reverse order, so the first of these gradients comes before the rest of the round's backward.
    """
    passed_on = {id(t) for t in tree_leaves(read)}
    for t in tree_leaves(outputs):
        if isinstance(t, torch.Tensor) and t.requires_grad and id(t) not in passed_on:
            t.register_hook(lambda _: on_round(r))


def run_layers(
    context: RoundContext,
    r: Round,
    inputs: RoundInputs,
    x_RLD: torch.Tensor | None,
    state: FastWeights,
    boundary_state: FastWeights,
) -> tuple[Features, torch.Tensor | None, FastWeights]:
    """Runs the layers of a round that the context's model holds; the model may be a part of a larger one.

    x_RLD: the input of the first layer; None: the embedded tokens. Returns the core's features for later passes, the
    output of the last layer (None if nobody reads it), and the state.
    """
    model, settings = context.model, context.settings
    first, last = settings.core
    x: torch.Tensor | None = model.embed(inputs.tokens_RL) if x_RLD is None else x_RLD
    core_input = core_output = None
    # Sleep passes restart the core's convolutions: their input does not continue the previous window.
    across = settings.boundary if r.is_wake else replace(settings.boundary, carry_conv=False)
    s = _readable(state, boundary_state, last)
    layers = round_layers(r, model.config.layers, settings.core, settings.boundary.sliding_window is not None)
    sections = ((0, first, across), (first, last, across), (last, model.num_layers, settings.boundary))
    for begin, end, boundary in sections:
        low, high = max(begin, layers.start, model.layers.start), min(end, layers.stop, model.layers.stop)
        if low >= high:
            continue
        if low == first:
            core_input = x
        x, s = model.run(
            x,
            s,
            inputs.layout,
            first=low,
            last=high,
            boundary=boundary,
            state_only=r.state_only and high == layers.stop,
            run_block=settings.recompute.block,
        )
        if high == last:
            core_output = None if x is None else model.fed_back(x)
            if settings.on_features is not None and x is not None:
                settings.on_features(r, inputs.layout, x)
    begin, end = 0 if r.is_wake else first, model.num_layers if r.coda else last
    return Features(r.rows, core_input, core_output), x, state.replace(begin, s.layers[begin:end])


def _readable(state: FastWeights, boundary_state: FastWeights, coda: int) -> FastWeights:
    """The state, but with coda and retained caches from the window's start."""
    return FastWeights(
        tuple(
            old if layer >= coda or isinstance(new, Retained) else new
            for layer, (new, old) in enumerate(zip(state.layers, boundary_state.layers, strict=True))
        )
    )


def at_targets(x_RLD: torch.Tensor, inputs: RoundInputs) -> torch.Tensor:
    """The features [N, D] at the positions with a target, where alone the head runs."""
    x_ND = x_RLD.flatten(0, 1)
    return x_ND if inputs.target_index_N is None else x_ND.index_select(0, inputs.target_index_N)


def summed_loss(
    context: RoundContext, x_ND: torch.Tensor, r: Round, inputs: RoundInputs, keep: bool = True
) -> torch.Tensor:
    """Summed cross entropy in nats over the targets of a round. x_ND: the features at the targets.

    keep: the backward may find the logits kept (`Hybrid.cross_entropy`).
    """
    read_logits = context.read_logits
    read = None if read_logits is None else lambda first, *chunk: read_logits(r, first, *chunk)
    return context.model.cross_entropy(x_ND, inputs.targets_N, read, keep)


def loop_settings(sleep: SleepConfig, window: int, num_layers: int, recompute: str | None = None) -> LoopSettings:
    """The settings of a loop over windows of `window` tokens. recompute: overrides the configured mode."""
    first, last = sleep.core or (0, num_layers)
    boundary = Boundary(
        sliding_window=window if sleep.eviction == "sliding" else None,
        carry_conv=sleep.conv_state == "carry",
    )
    return LoopSettings((first, last), boundary, Recompute(recompute or sleep.recompute))
