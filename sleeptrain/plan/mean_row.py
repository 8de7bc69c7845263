"""The mean cost of a training row. Rows of a task differ in their windows and targets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import torch

from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.tasks.build import build_task
from sleeptrain.sleep.curriculum import StepShape, shape_starts, stage_shape
from sleeptrain.sleep.flops import step_flops
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import plan_batch

SAMPLED_TOKENS = 2**21


class MeanRow:
    """Means over a sample of a task's rows, the same for every seed.

    They are exact if all rows have targets in the same windows, as those of text and Rule 110. `model.vocab_size` must
    be known. Raises ConfigError or DataError if the task cannot be built.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._flops: dict[tuple[int, int], int] = {}

    @cached_property
    def tokens(self) -> float:
        """Mean tokens of a row, pads excluded."""
        return int((self._sample.documents_BT != PAD).sum()) / len(self._sample.tokens_BT)

    def step_flops(self, shape: StepShape) -> int:
        """Model FLOPs of a step of this shape: all passes counted, recomputation not."""
        key = shape.window, shape.passes
        if key not in self._flops:
            self._flops[key] = self._sample_flops(*key)
        return round(self._flops[key] * shape.batch / len(self._sample.tokens_BT))

    def step_tokens(self, shape: StepShape) -> int:
        """Tokens of a step of this shape, pads excluded."""
        return round(self.tokens * shape.batch)

    def stages(self) -> Iterator[tuple[int, StepShape, int]]:
        """(first token, shape, number of steps) of each curriculum stage that the run reaches."""
        total, seen = self._config.train.tokens, 0
        for start, stop in pairwise([*(start for start in shape_starts(self._config) if start < total), total]):
            shape = stage_shape(self._config, start)
            num_steps = max(-(-(stop - seen) // self.step_tokens(shape)), 0)
            yield start, shape, num_steps
            seen += num_steps * self.step_tokens(shape)

    @cached_property
    def _sample(self) -> Batch:
        data = self._config.data
        if data.source == "shards":
            return long_rows(1, data.sequence)
        task = build_task(data)
        return task.rows(0, 0, 1 if task.rows_alike else max(SAMPLED_TOKENS // task.sequence, 1))

    def _sample_flops(self, window: int, passes: int) -> int:
        """Model FLOPs of the sample. Plans at most three passes: each further pass costs as much as the third."""
        if passes > 3:
            two, three = (self._sample_flops(window, n) for n in (2, 3))
            return two + (passes - 2) * (three - two)
        config = self._config
        rounds = plan_batch(self._sample, window, passes, config.sleep, config.parallel.token_parts)
        settings = loop_settings(config.sleep, window, len(config.model.layers), recompute="none")
        targets = int((self._sample.targets_BT != IGNORE).sum())
        return step_flops(config.model, rounds, targets, settings.core, settings.boundary.sliding_window)


def long_rows(rows: int, tokens: int) -> Batch:
    """Rows in the middle of long documents."""
    zeros = torch.zeros(rows, tokens, dtype=torch.long)
    goes_on = torch.ones(rows, dtype=torch.bool)
    return Batch(zeros, zeros, zeros, goes_on, goes_on)
