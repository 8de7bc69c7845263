"""One training step: forward and backward over the rounds of a batch, in micro-batches of rows and of windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, loop_settings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_rounds, window_facts, windows_of
from sleeptrain.train.flops import step_flops


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step's batch with their round plan; `first` is the index of the first row."""

    first: int
    batch: Batch
    rounds: list[Round]


@dataclass(frozen=True)
class StepResult:
    """loss: mean cross entropy over the step's targets, nats a token.

    state: the memory behind the last window, detached, for the step that continues these rows. num_rounds: (window,
    pass) pairs run. flops: model FLOPs, passes counted.
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
        facts = window_facts(part, shape.window)
        yield MicroBatch(first, part, plan_rounds(facts, shape.passes, config.sleep.when, config.sleep.feedback))


def forward_backward(
    model: Hybrid,
    batch: Batch,
    shape: StepShape,
    config: Config,
    carried: FastWeights | None,
    settings: LoopSettings | None = None,
) -> StepResult:
    """Adds the gradient of the step's mean loss to the parameters.

    carried: the memory that the step before left in these rows (None: none). Every micro-batch's loss is divided by the
    targets of the whole batch, so that the cut does not weigh in. settings: how rounds are run, if not as configured.
    """
    num_rows, num_targets = batch.tokens_BT.shape[0], int((batch.targets_BT != IGNORE).sum())
    device, divisor = model.head_weight.device, max(num_targets, 1)
    settings = settings or loop_settings(config, shape.window, model.num_layers)
    total = torch.zeros((), dtype=torch.float64)
    left, num_rounds, flops = model.empty_state(), 0, 0
    for micro in micro_batches(batch, shape, config):
        state = start_state(model, micro, carried)
        for rounds in truncated(micro.rounds, config.sleep.bptt_windows):
            with autocast(config, device):
                losses, state = run_rounds(model, micro.batch, rounds, state, settings)
            if losses:
                loss = torch.stack(list(losses.values())).sum() / divisor
                loss.backward()
                total += loss.detach().to("cpu", torch.float64)
            state = state.detach()
        rows = torch.arange(micro.first, micro.first + micro.batch.tokens_BT.shape[0], device=device)
        left = left.put_rows(rows, state, num_rows)
        num_rounds += len(micro.rounds)
        flops += _flops(config, micro.rounds, settings)
    flops += step_flops(config.model, [], num_targets, settings.core)
    return StepResult(float(total), left, num_rounds, flops)


def start_state(model: Hybrid, micro: MicroBatch, carried: FastWeights | None) -> FastWeights:
    """The memory that a micro-batch begins with: what was carried where its rows go on, nothing elsewhere."""
    if carried is None or not bool(micro.batch.carried_B.any()):
        return model.empty_state()
    device = model.head_weight.device
    rows = torch.arange(micro.first, micro.first + micro.batch.tokens_BT.shape[0], device=device)
    return carried.rows(rows).keep_rows(micro.batch.carried_B.to(device))


def truncated(rounds: Sequence[Round], bptt_windows: int | None) -> Iterator[list[Round]]:
    """The rounds in stretches of at most `bptt_windows` windows; between stretches the state is detached."""
    groups = windows_of(rounds)
    size = bptt_windows or max(len(groups), 1)
    for first in range(0, len(groups), size):
        yield [r for group in groups[first : first + size] for r in group]


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def _flops(config: Config, rounds: Sequence[Round], settings: LoopSettings) -> int:
    return step_flops(config.model, rounds, 0, settings.core, settings.boundary.sliding_window)
