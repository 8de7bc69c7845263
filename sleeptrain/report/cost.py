"""Training FLOPs of a run until each of its records, from its configuration: a curriculum changes what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from sleeptrain.config.schema import Config
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.sleep.curriculum import StepShape, step_shape
from sleeptrain.train.logging.metrics import Record


def training_flops(config: Config, records: Sequence[Record]) -> dict[int, int]:
    """Model FLOPs of all steps up to the step of each record, passes counted, recomputation and evaluation not.

    A step costs what the mean of a task's rows does (`plan.mean_row`). Its shape is the curriculum's, where N is
    sampled the N that was drawn, or what the next training record of the attempt says where that is another (settings
    that were changed on the way), behind the last one what that one says. Raises ConfigError and DataError where the
    task cannot be built.
    """
    mean = MeanRow(config)
    flops, step, tokens = 0, 0, 0
    found = {0: 0}
    other: StepShape | None = None  # of the steps, where it is not the curriculum's
    for stretch in _stretches(sorted(records, key=lambda r: r["step"])):
        shapes = []
        for record in stretch:
            shapes.append(_curriculum(config, range(step, record["step"]), tokens, mean.step_tokens))
            step, tokens = record["step"], record["tokens"]
        planned = [shape for own in shapes for shape in own]
        if "loss" in stretch[-1] and planned:
            logged = StepShape(stretch[-1]["passes"], stretch[-1]["window"], stretch[-1]["batch"])
            other = None if planned[-1] == logged else logged
        for record, own in zip(stretch, shapes, strict=True):
            flops += sum(mean.step_flops(other or shape) for shape in own)
            found[record["step"]] = flops
    return found


def _stretches(records: Sequence[Record]) -> list[list[Record]]:
    """The records cut behind each training record and behind the beginning of each attempt."""
    ends = [at for at, record in enumerate(records, 1) if "loss" in record or "attempt" in record]
    cuts = [0, *ends, len(records)]
    return [list(records[first:last]) for first, last in pairwise(cuts) if first < last]


def _curriculum(config: Config, steps: range, tokens: int, tokens_of: Callable[[StepShape], int]) -> list[StepShape]:
    """The shapes of these steps by the settings. tokens: that were seen before the first of them."""
    shapes = []
    for number in steps:
        shapes.append(step_shape(config, tokens, number))
        tokens += tokens_of(shapes[-1])
    return shapes
