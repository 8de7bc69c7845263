"""One training step: forward and backward over the rounds of a batch, in micro-batches of rows and of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import forward_flops, step_flops
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.loop import LoopSettings, OnFeatures, loop_settings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.round_layouts import retained_documents
from sleeptrain.sleep.rounds import Round, plan_batch, windows_of
from sleeptrain.sleep.stop_rule import StopRule, stop_rule
from sleeptrain.sleep.until_stopped import RuledRounds, deciding_rounds, run_until_stopped
from sleeptrain.watch.progress import Phase, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step's batch with their round plan.

    first: the index of the first row in the step's batch.
    retained_BC: `retained_documents` of the carried memory of its rows; None: no row carries any.
    """

    first: int
    batch: Batch
    rounds: list[Round]
    retained_BC: torch.Tensor | None = None

    def rows(self, device: torch.device) -> torch.Tensor:
        """The indices of its rows in the step's batch, int64."""
        return torch.arange(self.first, self.first + self.batch.tokens_BT.shape[0], device=device)


@dataclass(frozen=True)
class StepResult:
    """The result of one training step.

    loss: mean cross entropy over the step's targets, nats per token; as one process's part of a result, its share.
    state: the memory after the last window, detached, for the step that continues these rows.
    num_rounds: the number of (window, pass) pairs that ran.
    flops: model FLOPs of all passes, and of the decisions of a stop rule; with several processes, this process's equal
        share.
    """

    loss: float
    state: FastWeights
    num_rounds: int
    flops: int


# The rounds of each micro-batch of a step.
Plans = Sequence[Sequence[Round]]


def plan_micro_batches(batch: Batch, shape: StepShape, config: Config) -> list[list[Round]]:
    """The rounds of each micro-batch: a pure function of its rows, on the CPU, that any thread may call."""
    parts = [batch.rows(rows.start, rows.stop) for rows in _micro_batch_rows(batch, config)]
    multiple = config.parallel.token_parts
    return [plan_batch(part, shape.window, shape.passes, config.sleep, multiple) for part in parts]


def _micro_batch_rows(batch: Batch, config: Config) -> list[range]:
    num_rows = batch.tokens_BT.shape[0]
    size = config.train.micro_batch or num_rows
    return [range(first, first + size) for first in range(0, num_rows, size)]


def micro_batches(
    batch: Batch, shape: StepShape, config: Config, carried: FastWeights | None = None, plans: Plans | None = None
) -> Iterator[MicroBatch]:
    """Cuts a batch into parts of `train.micro_batch` rows, each with its rounds.

    carried: the memory of the step's rows; its documents are read once, before a GPU has work of the step to wait for.
    plans: the rounds of each part, if they are known (`plan_micro_batches`).
    """
    plans = plan_micro_batches(batch, shape, config) if plans is None else plans
    retained_BC = None if carried is None or not bool(batch.carried_B.any()) else retained_documents(carried)
    for rows, rounds in zip(_micro_batch_rows(batch, config), plans, strict=True):
        retained = None if retained_BC is None else retained_BC[rows.start : rows.stop]
        yield MicroBatch(rows.start, batch.rows(rows.start, rows.stop), list(rounds), retained)


class DirectCalls:
    """Forward and backward by torch alone, as in a single process.

    `sleeptrain.parallel.zero.engine.ZeroEngine` does both with DeepSpeed.
    """

    def __init__(self, model: Hybrid):
        self._model = model

    def forward(self, function: Callable[[Hybrid], T]) -> T:
        """`function(model)`."""
        return function(self._model)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a scalar to the parameters."""
        loss.backward()


class Calls(Protocol):
    """The interface of `DirectCalls`, which engines implement."""

    def forward(self, function: Callable[[Any], T]) -> T: ...

    def backward(self, loss: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class StepContext:
    """How a step is carried out.

    config: the run's configuration.
    settings: how the step's rounds are run.
    progress: this process's progress, updated in each round.
    calls: how the model's forward and backward are called.
    copies: matrices are cast once a step (`in_precision`).
    graphs: runs rounds as CUDA graphs; None: without.
    """

    config: Config
    settings: LoopSettings
    progress: Progress
    calls: Calls
    copies: bool = True
    graphs: RoundGraphs | None = None


def step_context(
    config: Config,
    shape: StepShape,
    model: Hybrid,
    progress: Progress | None = None,
    on_features: OnFeatures | None = None,
    calls: Calls | None = None,
    graphs: RoundGraphs | None = None,
) -> StepContext:
    """The context of a step under this configuration. on_features: as in `LoopSettings`."""
    current = progress or Progress()
    settings = loop_settings(config.sleep, shape.window, model.num_layers)
    settings = replace(settings, on_round=current.at, on_features=on_features, graphs=graphs)
    return StepContext(config, settings, current, calls or DirectCalls(model), graphs=graphs)


def forward_backward(
    context: StepContext,
    model: Hybrid,
    batch: Batch,
    shape: StepShape,
    carried: FastWeights | None,
    divisor: int | None = None,
    plans: Plans | None = None,
) -> StepResult:
    """Adds the gradient of the step's mean loss to the parameters, computed in `train.precision`.

    carried: the memory of these rows after the previous step; None: empty. divisor: the divisor of every micro-batch's
    summed loss, the same for all, so the cut does not change the gradient; None: the number of targets in the batch.
    plans: as in `micro_batches`.
    """
    graphs = context.graphs
    kept = None if graphs is None else graphs.kept
    with (
        nullcontext() if graphs is None else graphs.step(shape),
        in_precision(context.config.train, model, context.copies, kept),
    ):
        return _sum_micro_batches(context, model, batch, shape, carried, divisor, plans)


def _sum_micro_batches(
    context: StepContext,
    model: Hybrid,
    batch: Batch,
    shape: StepShape,
    carried: FastWeights | None,
    divisor: int | None,
    plans: Plans | None,
) -> StepResult:
    config, progress = context.config, context.progress
    num_rows, num_targets = batch.tokens_BT.shape[0], int((batch.targets_BT != IGNORE).sum())
    divisor = divisor or max(num_targets, 1)
    total = torch.zeros((), dtype=torch.float64, device=model.device)  # read once, when the step has ended
    final_state, planned, flops = model.empty_state(), list[Round](), 0
    # With drawn N the draw decides in training, so that the model learns every number of passes.
    rule = None if config.sleep.sample_passes else stop_rule(config.sleep, context.settings.core)
    for micro in micro_batches(batch, shape, config, carried, plans):
        state = start_state(model, micro, carried)
        if rule is not None:
            micro, spent = _decided(context, model, micro, shape, state, rule)
            flops += spent
        for rounds in truncated(micro.rounds, config.sleep.bptt_windows):
            progress.begin(Phase.FORWARD)
            run = partial(
                run_rounds,
                batch=micro.batch,
                rounds=rounds,
                state=state,
                settings=context.settings,
                retained_BC=micro.retained_BC,
            )
            losses, state = context.calls.forward(run)
            if losses:
                loss = torch.stack(list(losses.values())).sum() / divisor
                progress.begin(Phase.BACKWARD)
                context.calls.backward(loss)
                total += loss.detach()
            state = state.detach()
        final_state = final_state.put_rows(micro.rows(model.device), state, num_rows)
        planned += micro.rounds
    core, boundary = context.settings.core, context.settings.boundary
    flops += step_flops(config.model, planned, num_targets, core, boundary.sliding_window)
    return StepResult(float(total), final_state, len(planned), flops)


def _decided(
    context: StepContext, model: Hybrid, micro: MicroBatch, shape: StepShape, state: FastWeights, rule: StopRule
) -> tuple[MicroBatch, int]:
    """The micro-batch with the rounds that a stop rule leaves, found by a forward without gradients, and its FLOPs."""
    rounds = deciding_rounds(micro.rounds)
    if not rounds:
        return micro, 0
    context.progress.begin(Phase.FORWARD)
    config, settings = context.config, replace(context.settings, on_features=None)
    ruled = RuledRounds(micro.batch, rounds, settings, rule, retained_BC=micro.retained_BC)
    stopped = context.calls.forward(partial(run_until_stopped, ruled=ruled, state=state))
    flops = forward_flops(config.model, stopped.rounds, settings.core, settings.boundary.sliding_window)
    flops += stopped.num_decisions * rule.flops(config.model.dim, rounds[-1].pass_index, model.device)
    planned = plan_batch(micro.batch, shape.window, stopped.passes_KB, config.sleep, config.parallel.token_parts)
    return replace(micro, rounds=planned), flops


def start_state(model: Hybrid, micro: MicroBatch, carried: FastWeights | None) -> FastWeights:
    """The memory at a micro-batch's start: the carried memory in rows that continue, and empty memory in other rows."""
    if carried is None or not bool(micro.batch.carried_B.any()):
        return model.empty_state()
    device = model.device
    return carried.rows(micro.rows(device)).keep_rows(micro.batch.carried_B.to(device))


def truncated(rounds: Sequence[Round], bptt_windows: int | None) -> Iterator[list[Round]]:
    """The rounds in stretches of at most `bptt_windows` windows; between stretches the state is detached."""
    groups = windows_of(rounds)
    size = bptt_windows or max(len(groups), 1)
    for first in range(0, len(groups), size):
        yield [r for group in groups[first : first + size] for r in group]
