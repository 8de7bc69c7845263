"""What all processes must know of a step before they run it, in one exchange of a few numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.distributed.world import World
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import micro_batches, truncated

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


def step_totals(
    config: Config, world: World, batch: Batch | None, shape: StepShape, stopping: bool = False
) -> StepTotals:
    """The totals of a step; all processes call it together. batch: this replica's rows, None if waiting was cancelled.

    Replicas produce their gradients in the same order if their plans are equal, or if every backward covers a first
    round that predicts: that round runs all layers and its gradients come last.
    """
    tokens = 0 if batch is None else int((batch.documents_BT != PAD).sum())
    targets = 0 if batch is None else int((batch.targets_BT != IGNORE).sum())
    late, order = 0, list[float]()
    if asks_order(config):
        stretches = [] if batch is None else _stretches(config, batch, shape)
        late = sum(not rounds[0].loss for rounds in stretches)
        order = [float(n) for number in (*_digest(stretches), len(stretches)) for n in (number, -number)]
    sums, largest = world.sum_and_max([tokens, targets, stopping, batch is None, late], order)
    *equal, same_length = [high == -low for high, low in zip(largest[::2], largest[1::2], strict=True)] or [False]
    return StepTotals(
        tokens=round(sums[0] / world.model_parallel_size),
        targets=round(sums[1] / world.model_parallel_size),
        stopping=round(sums[2]),
        cancelled=round(sums[3]),
        alike=same_length and (all(equal) or not sums[4]),
    )


def _stretches(config: Config, batch: Batch, shape: StepShape) -> list[list[Round]]:
    """The rounds of each backward, without what does not change the order of gradients."""
    plans = [micro.rounds for micro in micro_batches(batch, shape, config)]
    stretches = [rounds for plan in plans for rounds in truncated(plan, config.sleep.bptt_windows)]
    return [[replace(r, rows=(), skip=0, work=None) for r in rounds] for rounds in stretches]


def _digest(stretches: Sequence[Sequence[Round]]) -> list[int]:
    """Integers that differ where plans differ."""
    digest = hashlib.blake2b(repr(stretches).encode(), digest_size=2 * PART).digest()
    return [int.from_bytes(digest[first : first + PART]) for first in (0, PART)]
