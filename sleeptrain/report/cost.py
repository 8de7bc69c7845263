"""Training FLOPs of a run until each of its records, from its configuration: a curriculum changes what a step costs."""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.config.schema import Config
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.train.metrics import Record


def training_flops(config: Config, records: Sequence[Record]) -> dict[int, int]:
    """Model FLOPs of all steps up to the step of each record, passes counted, recomputation and evaluation not.

    A step costs what the mean of a task's rows does (`plan.mean_row`). Its shape is the curriculum's, where N is
    sampled the N that was drawn, or what the next training record says where that is another (settings that were
    changed on the way). Raises ConfigError and DataError where the task cannot be built.
    """
    mean = MeanRow(config)
    flops, step, tokens = 0, 0, 0
    found = {0: 0}
    for record in sorted(records, key=lambda r: r["step"]):
        flops += sum(map(mean.step_flops, _shapes(config, record, step, tokens, mean.step_tokens)))
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
