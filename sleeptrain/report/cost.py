"""Training FLOPs of a run until each of its records, from its configuration: a curriculum changes what a step costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, PAD
from sleeptrain.plan.workload import typical_batch
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.train.flops import step_flops
from sleeptrain.train.metrics import Record


def training_flops(config: Config, records: Sequence[Record]) -> dict[int, int]:
    """Model FLOPs of all steps up to the step of each record, passes counted, recomputation and evaluation not.

    A step costs what a typical batch of its shape does (`train.flops`): exact where all rows have the same windows with
    targets. Its shape is the curriculum's, where N is sampled the N that was drawn, or what the next training record
    says where that is another (settings that were changed on the way). Raises ConfigError and DataError where the task
    cannot be built.
    """
    cost = cache(lambda shape: step_cost(config, shape))
    flops, step, tokens = 0, 0, 0
    found = {0: 0}
    for record in sorted(records, key=lambda r: r["step"]):
        found_shapes = _shapes(config, record, step, tokens, lambda shape: cost(shape)[1])
        flops += sum(cost(shape)[0] for shape in found_shapes)
        step, tokens = record["step"], record["tokens"]
        found[step] = flops
    return found


def _shapes(config: Config, record: Record, step: int, tokens: int, tokens_of) -> list[StepShape]:
    """Of the steps behind `step`, when `tokens` had been seen, up to the record's."""
    shapes = []
    for number in range(step, record["step"]):
        shapes.append(step_shape(config, tokens, number))
        tokens += tokens_of(shapes[-1])
    if "loss" in record and shapes:
        logged = StepShape(record["passes"], record["window"], record["batch"])
        if shapes[-1] != logged:
            return [logged] * len(shapes)
    return shapes


def step_cost(config: Config, shape: StepShape) -> tuple[int, int]:
    """(FLOPs, tokens that are no pads) of a step of this shape."""
    batch = typical_batch(config, shape.batch)
    rounds = plan_batch(batch, shape.window, shape.passes, config.sleep)
    settings = loop_settings(config.sleep, shape.window, len(config.model.layers))
    targets = int((batch.targets_BT != IGNORE).sum())
    flops = step_flops(config.model, rounds, targets, settings.core, settings.boundary.sliding_window)
    return flops, int((batch.documents_BT != PAD).sum())
