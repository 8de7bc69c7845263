"""One training step: forward and backward over the rounds of a batch, in micro-batches of rows and of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.flops import step_flops
from sleeptrain.sleep.loop import LoopSettings, OnFeatures, loop_settings
from sleeptrain.sleep.precision import run_rounds_in_precision
from sleeptrain.sleep.rounds import Round, plan_batch, windows_of
from sleeptrain.watch.progress import Phase, Progress


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step's batch with their round plan; `first` is the index of the first row."""

    first: int
    batch: Batch
    rounds: list[Round]

    def rows(self, device: torch.device) -> torch.Tensor:
        """The indices of its rows in the step's batch, int64."""
        return torch.arange(self.first, self.first + self.batch.tokens_BT.shape[0], device=device)


@dataclass(frozen=True)
class StepResult:
    """loss: mean cross entropy over the step's targets, nats a token.

    state: the memory behind the last window, detached, for the step that continues these rows. num_rounds: (window,
    pass) pairs run. flops: model FLOPs, passes counted; of several processes, an equal share of them.
    """

    loss: float
    state: FastWeights
    num_rounds: int
    flops: int


def micro_batches(batch: Batch, shape: StepShape, config: Config) -> Iterator[MicroBatch]:
    """Cuts a batch by `train.micro_batch` rows and plans the rounds of each part."""
    num_rows = batch.tokens_BT.shape[0]
    size = config.train.micro_batch or num_rows
    for first in range(0, num_rows, size):
        part = batch.rows(first, first + size)
        yield MicroBatch(first, part, plan_batch(part, shape.window, shape.passes, config.sleep))


def forward_backward(
    model: Hybrid,
    batch: Batch,
    shape: StepShape,
    config: Config,
    carried: FastWeights | None,
    settings: LoopSettings | None = None,
    *,
    progress: Progress | None = None,
    on_features: OnFeatures | None = None,
    divisor: int | None = None,
    forward: Callable[[Callable[[Any], Any]], Any] | None = None,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> StepResult:
    """Adds the gradient of the step's mean loss to the parameters.

    carried: the memory that the step before left in these rows (None: none). settings: how rounds are run, if not as
    configured. whereabouts: kept current, and on_features: as in `LoopSettings`, where `settings` are not given.
    divisor: what every micro-batch's summed loss is divided by, so that the cut does not weigh in; the targets of the
    batch if not given. forward, backward: how another one calls a function of the model, and adds the gradients of a
    scalar (`sleeptrain.parallel.zero.engine.ZeroEngine`).
    """
    num_rows, num_targets = batch.tokens_BT.shape[0], int((batch.targets_BT != IGNORE).sum())
    device, divisor = model.device, divisor or max(num_targets, 1)
    here = progress or Progress()
    if settings is None:
        settings = loop_settings(config.sleep, shape.window, model.num_layers)
        settings = replace(settings, on_round=here.at, on_features=on_features)
    total = torch.zeros((), dtype=torch.float64)
    left, planned = model.empty_state(), list[Round]()
    for micro in micro_batches(batch, shape, config):
        state = start_state(model, micro, carried)
        for rounds in truncated(micro.rounds, config.sleep.bptt_windows):
            here.begin(Phase.FORWARD)
            run = partial(
                run_rounds_in_precision, config, batch=micro.batch, rounds=rounds, state=state, settings=settings
            )
            losses, state = run(model) if forward is None else forward(run)
            if losses:
                loss = torch.stack(list(losses.values())).sum() / divisor
                here.begin(Phase.BACKWARD)
                backward(loss)
                total += loss.detach().to("cpu", torch.float64)
            state = state.detach()
        left = left.put_rows(micro.rows(device), state, num_rows)
        planned += micro.rounds
    flops = step_flops(config.model, planned, num_targets, settings.core, settings.boundary.sliding_window)
    return StepResult(float(total), left, len(planned), flops)


def start_state(model: Hybrid, micro: MicroBatch, carried: FastWeights | None) -> FastWeights:
    """The memory that a micro-batch begins with: what was carried where its rows go on, nothing elsewhere."""
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
