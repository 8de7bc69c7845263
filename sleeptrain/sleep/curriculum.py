"""The curriculum: number of passes, window and batch as functions of the tokens seen, the same for every process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sleeptrain.config.schema import Config


@dataclass(frozen=True)
class StepShape:
    """N (`passes`), L (`window`) and the rows of the batch in one step."""

    passes: int
    window: int
    batch: int


def stage_shape(config: Config, tokens_seen: int) -> StepShape:
    """The shape that the curriculum gives when `tokens_seen` wake tokens have been trained on.

    Each stage overrides what it names from its `tokens` on.
    """
    passes, window, batch = config.sleep.passes, config.sleep.window, config.data.batch
    for stage in config.sleep.curriculum:
        if tokens_seen >= stage.tokens:
            passes = stage.passes or passes
            window = stage.window or window
            batch = stage.batch or batch
    return StepShape(passes, window, batch)


def step_shape(config: Config, tokens_seen: int, step: int) -> StepShape:
    """The shape of one step: its stage's, where with `sleep.sample_passes` N is drawn uniformly from 1..passes.

    The draw is a function of (train.seed, step): every process and every resumed run draws the same.
    """
    shape = stage_shape(config, tokens_seen)
    if not config.sleep.sample_passes:
        return shape
    bits = np.random.Philox(key=np.array([config.train.seed, step], dtype=np.uint64))
    return replace(shape, passes=int(np.random.Generator(bits).integers(1, shape.passes, endpoint=True)))
