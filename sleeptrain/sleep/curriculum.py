"""The curriculum: number of passes, window and batch as functions of the tokens seen, the same for every process."""

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
    """The shape that the curriculum gives when `tokens_seen` wake tokens have been trained on.

    Each stage overrides what it names from its `tokens` on; N may come to a stage's value by a ramp (`ramped`).
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
    """What the curriculum said for the last step before a checkpoint, whose `state.json` is `state`; for the first step
    where there has been none."""
    return StepShape(**state["shape"]) if state["shape"] else stage_shape(config, 0)


def ramped(before: int, stage: CurriculumStage, start: int, tokens_seen: int) -> int:
    """N on the way from `before`, in force from `start` tokens on, to that of a stage that is not reached yet.

    `linear` holds every number from the first to the last equally long. `sqrt` goes by 1 - sqrt(1 - p) for the share p
    of the way instead (the 1-sqrt of arXiv 2511.07384): few passes for long, the last ones in quick succession.
    """
    if stage.ramp == "step" or stage.passes is None:
        return before
    share = (tokens_seen - start) / (stage.tokens - start)
    risen = share if stage.ramp == "linear" else 1 - math.sqrt(1 - share)
    distance = abs(stage.passes - before)
    steps = min(int((distance + 1) * risen), distance)
    return before + int(math.copysign(steps, stage.passes - before))


def shape_starts(config: Config) -> list[int]:
    """The tokens from which on steps have another shape, ascending from 0."""
    starts, start, passes = {0}, 0, config.sleep.passes
    for stage in config.sleep.curriculum:
        starts.update(_ramp_starts(passes, stage, start))
        starts.add(stage.tokens)
        passes, start = stage.passes or passes, stage.tokens
    return sorted(starts)


def _ramp_starts(before: int, stage: CurriculumStage, start: int) -> Iterator[int]:
    """Where N changes on the way to a stage."""
    low, now = start, before
    while (last := ramped(before, stage, start, stage.tokens - 1)) != now:
        high = stage.tokens - 1
        while low + 1 < high:  # the first place with another N than at `low`
            middle = (low + high) // 2
            low, high = (middle, high) if ramped(before, stage, start, middle) == now else (low, middle)
        now, low = ramped(before, stage, start, high), high
        yield high
        if now == last:
            return


def step_shape(config: Config, tokens_seen: int, step: int) -> StepShape:
    """The shape of one step: its stage's, where with `sleep.sample_passes` N is drawn uniformly from 1..passes.

    The draw is a function of (train.seed, step): every process and every resumed run draws the same.
    """
    shape = stage_shape(config, tokens_seen)
    if not config.sleep.sample_passes:
        return shape
    bits = np.random.Philox(key=np.array([config.train.seed, step], dtype=np.uint64))
    return replace(shape, passes=int(np.random.Generator(bits).integers(1, shape.passes, endpoint=True)))
