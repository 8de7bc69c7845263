"""Training FLOPs of a run whose records have none, from its configuration. A curriculum changes the cost of a step.

The records of runs that began under an early version have no FLOPs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sleeptrain.config.schema import Config
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.report.records import Records
from sleeptrain.sleep.curriculum import StepShape, shape_starts, stage_shape, step_shape

# (shape, number of steps of this shape).
Steps = tuple[StepShape, int]


class Mark(NamedTuple):
    """A record up to which FLOPs are counted.

    step, tokens: of the record.
    logged: the shape of its step, if it is a training record.
    ends: it ends a stretch: a training record gives the shape of the steps up to here, or an attempt has ended.
    """

    step: int
    tokens: int
    logged: StepShape | None = None
    ends: bool = False


def training_flops(config: Config, records: Records) -> dict[int, int]:
    """{step: model FLOPs of all steps up to it}; all passes counted, recomputation and evaluation not.

    Keys: the step of each evaluation, of each start of an attempt, of the last record, and of each training record at
    which the cost of a step changes.

    A step costs the mean over a task's rows (`plan.mean_row`). Its shape is the curriculum's; if N is sampled, with the
    drawn N. If the next training record of the attempt has another shape (settings were changed during the run), that
    shape counts; after the last record, the shape of the last record. Raises ConfigError or DataError if the task
    cannot be built.
    """
    mean, starts = MeanRow(config), shape_starts(config)
    flops, step, tokens = 0, 0, 0
    flops_at_step = {0: 0}
    other: StepShape | None = None  # the shape of the steps, if it is not the curriculum's
    for stretch in _stretches(_marks(config, records, starts)):
        planned: list[list[Steps]] = []
        for mark in stretch:
            planned.append(_curriculum(config, mean, starts, range(step, mark.step), tokens))
            step, tokens = mark.step, mark.tokens
        shapes = [shape for steps in planned for shape, _ in steps]
        logged = stretch[-1].logged
        if logged and shapes:
            other = None if shapes[-1] == logged else logged
        for mark, steps in zip(stretch, planned, strict=True):
            flops += sum(number * mean.step_flops(other or shape) for shape, number in steps)
            flops_at_step[mark.step] = flops
    return flops_at_step


def _marks(config: Config, records: Records, starts: Sequence[int]) -> Iterator[Mark]:
    """The marks, sorted by step. Among equal steps a training record comes first: others describe the time after it."""
    step, tokens = records.column("step"), records.column("tokens")
    others = [Mark(r["step"], r["tokens"]) for r in records.evaluations]
    others += [Mark(r["step"], r["tokens"], ends=True) for r in records.attempts]
    others = sorted([*others, Mark(*records.furthest)], key=lambda mark: mark.step)
    needed = np.flatnonzero(_needed(config, records, starts, np.array([mark.step for mark in others])))
    needed = needed[np.argsort(step[needed], kind="stable")]
    trained = (Mark(int(step[index]), int(tokens[index]), records.shape(int(index)), ends=True) for index in needed)
    return merge(trained, others, key=lambda mark: mark.step)


def _needed(
    config: Config, records: Records, starts: Sequence[int], other_steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """True for each training record that must be a mark.

    Steps between records of one shape, in one curriculum stage and without another mark between them, cost the same, so
    the first and the last of these records are enough.

    starts: of the curriculum stages (`shape_starts`). other_steps: steps of the other marks, sorted.
    """
    step = records.column("step")
    if config.sleep.sample_passes or len(step) == 0 or bool((np.diff(step) < 0).any()):
        return np.ones(len(step), bool)
    stage = np.searchsorted(starts, records.column("tokens"), side="right")
    num_before = np.searchsorted(other_steps, step, side="left")  # number of other marks below the step of each record
    same = np.ones(len(step) - 1, bool)
    for values in (stage, num_before, *(records.column(name) for name in ("passes", "window", "batch"))):
        same &= values[1:] == values[:-1]
    needed = np.ones(len(step), bool)
    # A record between two records of its kind is not needed.
    needed[1:-1] = ~(same[:-1] & same[1:])
    return needed


def _stretches(marks: Iterable[Mark]) -> Iterator[list[Mark]]:
    """The marks, cut into stretches after each mark that ends one."""
    stretch: list[Mark] = []
    for mark in marks:
        stretch.append(mark)
        if mark.ends:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _curriculum(config: Config, mean: MeanRow, starts: Sequence[int], steps: range, tokens: int) -> list[Steps]:
    """The shapes of these steps according to the settings. tokens: seen before the first step."""
    shapes: list[Steps] = []
    first = steps.start
    while first < steps.stop:
        if config.sleep.sample_passes:
            shape, number = step_shape(config, tokens, first), 1
        else:
            shape, number = stage_shape(config, tokens), steps.stop - first
            later_starts = starts[bisect_right(starts, tokens) :]
            if later_starts:
                number = min(number, -(-(later_starts[0] - tokens) // mean.step_tokens(shape)))
        shapes.append((shape, number))
        first, tokens = first + number, tokens + number * mean.step_tokens(shape)
    return shapes
