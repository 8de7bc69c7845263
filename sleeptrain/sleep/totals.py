"""What all processes must know of a step and of the one before it, in one exchange of a few numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.distributed.world import World
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import StepResult, plan_micro_batches, truncated

# Bytes of a part of a digest: fp64 holds such an integer exactly.
PART = 6


@dataclass(frozen=True)
class StepTotals:
    """Facts about a step's rows in all replicas, equal in all processes.

    tokens, targets: the numbers of tokens without pads, and of targets.
    stopping: the number of processes that are to stop.
    cancelled: the number of processes without a batch, since waiting for data was cancelled.
    alike: all replicas produce their gradients in the same order; False where nobody asks (`asks_order`).
    """

    tokens: int
    targets: int
    stopping: int
    cancelled: int
    alike: bool


def asks_order(config: Config) -> bool:
    """True if gradients may be summed in each backward: ZeRO-2 and 3 without a pipeline, whose stages differ anyway."""
    return config.parallel.zero >= 2 and config.parallel.pipeline == 1


@dataclass(frozen=True)
class StepFacts:
    """What one process knows of a step before it.

    sums: numbers that are summed over processes: tokens, targets, stopping, cancelled, and backwards that do not begin
        with a round that predicts.
    largest: numbers of which the largest counts; they tell whether all replicas have the same plan.
    """

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    largest: list[float] = field(default_factory=list)


def step_facts(
    config: Config, batch: Batch | None, plans: Sequence[Sequence[Round]], stopping: bool = False
) -> StepFacts:
    """This process's facts. batch: this replica's rows, None if there are none. plans: the rounds of each micro-batch.

    Replicas produce their gradients in the same order if their plans are equal, or if every backward covers a first
    round that predicts: that round runs all layers and its gradients come last.
    """
    tokens = 0 if batch is None else int((batch.documents_BT != PAD).sum())
    targets = 0 if batch is None else int((batch.targets_BT != IGNORE).sum())
    late, order = 0, list[float]()
    if asks_order(config):
        stretches = _stretches(config, plans)
        late = sum(not rounds[0].loss for rounds in stretches)
        order = [float(n) for number in (*_digest(stretches), len(stretches)) for n in (number, -number)]
    return StepFacts([tokens, targets, stopping, batch is None, late], order)


def step_totals(
    config: Config, world: World, batch: Batch | None, shape: StepShape, stopping: bool = False
) -> StepTotals:
    """The totals of a step by an exchange of its own; all processes call it together."""
    plans = () if batch is None else plan_micro_batches(batch, shape, config)
    facts = step_facts(config, batch, plans, stopping)
    return joined_facts(world, *world.sum_and_max(facts.sums, facts.largest))


def joined_facts(world: World, sums: Sequence[float], largest: Sequence[float]) -> StepTotals:
    """The totals from the sums and the largest values over all processes of `StepFacts`."""
    *equal, same_length = [high == -low for high, low in zip(largest[::2], largest[1::2], strict=True)] or [False]
    return StepTotals(
        tokens=round(sums[0] / world.model_parallel_size),
        targets=round(sums[1] / world.model_parallel_size),
        stopping=round(sums[2]),
        cancelled=round(sums[3]),
        alike=same_length and (all(equal) or not sums[4]),
    )


def exchange_results(
    world: World, part: StepResult, norm: float, following: StepFacts
) -> tuple[StepResult, float, StepTotals]:
    """The step's result over all processes, its gradient norm, and the totals of the step that follows.

    All processes call it together, once a step, when the gradient norm is known and the weights are still the old ones.
    part: this process's part of the result (`Engine.forward_backward`). norm: that of the main process counts, so that
    decisions by it are the same in all: rounding may differ between processes.
    """
    mesh, replica = world.mesh, world.model_parallel_size
    # On the last stage every tensor rank of a replica has its loss; every process has the rounds and FLOPs.
    numbers = [part.loss / mesh.tensor.size, part.num_rounds, part.flops / replica, norm if world.is_main else 0.0]
    sums, largest = world.sum_and_max([*numbers, *following.sums], following.largest)
    loss, rounds, flops, first_norm = sums[: len(numbers)]
    result = replace(part, loss=loss, num_rounds=round(rounds / replica), flops=round(flops / world.size))
    return result, first_norm, joined_facts(world, sums[len(numbers) :], largest)


def _stretches(config: Config, plans: Sequence[Sequence[Round]]) -> list[list[Round]]:
    """The rounds of each backward, without what does not change the order of gradients."""
    stretches = [rounds for plan in plans for rounds in truncated(plan, config.sleep.bptt_windows)]
    return [[replace(r, rows=(), skip=0, work=None) for r in rounds] for rounds in stretches]


def _digest(stretches: Sequence[Sequence[Round]]) -> list[int]:
    """Integers that differ where plans differ."""
    digest = hashlib.blake2b(repr(stretches).encode(), digest_size=2 * PART).digest()
    return [int.from_bytes(digest[first : first + PART]) for first in (0, PART)]
