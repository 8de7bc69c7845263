"""The curriculum: passes, window and batch as functions of the tokens seen, the same in every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sleeptrain.config.schema import Config, CurriculumStage


@dataclass(frozen=True)
class StepShape:
    """N (`passes`), L (`window`) and the rows of the batch in one step."""

    passes: int
    window: int
    batch: int


def stage_shape(config: Config, tokens_seen: int) -> StepShape:
    """The shape that the curriculum gives after `tokens_seen` wake tokens.

    From its `tokens` on, each stage overrides the values that it names. N may reach a stage's value by a ramp
    (`ramped`).
    """
    passes, window, batch = config.sleep.passes, config.sleep.window, config.data.batch
    start = 0
    for stage in config.sleep.curriculum:
        if tokens_seen < stage.tokens:
            passes = ramped(passes, stage, start, tokens_seen)
            break
        passes, start = stage.passes or passes, stage.tokens
        window = stage.window or window
        batch = stage.batch or batch
    return StepShape(passes, window, batch)


def last_shape(config: Config, state: Mapping[str, Any]) -> StepShape:
    """The shape of the last step before a checkpoint, or of the first step if there was none.

    state: the checkpoint's `state.json`.
    """
    return StepShape(**state["shape"]) if state["shape"] else stage_shape(config, 0)


def ramped(before: int, stage: CurriculumStage, start: int, tokens_seen: int) -> int:
    """N on the ramp from `before`, in force from `start` tokens on, to the N of the next stage.

    `linear` holds every number of passes equally long. `sqrt` uses 1 - sqrt(1 - p) for the fraction p of the ramp (the
    1-sqrt of arXiv 2511.07384): few passes for a long time, then the last increases quickly.
    """
    if stage.ramp == "step" or stage.passes is None:
        return before
    fraction = (tokens_seen - start) / (stage.tokens - start)
    progress = fraction if stage.ramp == "linear" else 1 - math.sqrt(1 - fraction)
    distance = abs(stage.passes - before)
    steps = min(int((distance + 1) * progress), distance)
    return before + int(math.copysign(steps, stage.passes - before))


def shape_starts(config: Config) -> list[int]:
    """The numbers of tokens seen at which the shape changes, ascending, with 0 first."""
    starts, start, passes = {0}, 0, config.sleep.passes
    for stage in config.sleep.curriculum:
        starts.update(_ramp_starts(passes, stage, start))
        starts.add(stage.tokens)
        passes, start = stage.passes or passes, stage.tokens
    return sorted(starts)


def _ramp_starts(before: int, stage: CurriculumStage, start: int) -> Iterator[int]:
    """The numbers of tokens at which N changes on the ramp to a stage, found by bisection."""
    low, current = start, before
    while (last := ramped(before, stage, start, stage.tokens - 1)) != current:
        high = stage.tokens - 1
        while low + 1 < high:  # ends with high at the first token with another N than at `low`
            middle = (low + high) // 2
            low, high = (middle, high) if ramped(before, stage, start, middle) == current else (low, middle)
        current, low = ramped(before, stage, start, high), high
        yield high
        if current == last:
            return


def step_shape(config: Config, tokens_seen: int, step: int) -> StepShape:
    """The shape of one step. With `sleep.sample_passes` N is drawn uniformly from 1..passes.

    The draw is a function of (train.seed, step): every process and every resumed run draws the same.
    """
    shape = stage_shape(config, tokens_seen)
    if not config.sleep.sample_passes:
        return shape
    bits = np.random.Philox(key=np.array([config.train.seed, step], dtype=np.uint64))
    return replace(shape, passes=int(np.random.Generator(bits).integers(1, shape.passes, endpoint=True)))
