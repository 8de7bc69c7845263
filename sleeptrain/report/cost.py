"""Training FLOPs of a run until its records, from its configuration: a curriculum changes what a step costs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sleeptrain.config.schema import Config
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.report.records import Records
from sleeptrain.sleep.curriculum import StepShape, shape_starts, stage_shape, step_shape

# So many steps of one shape.
Steps = tuple[StepShape, int]


class Mark(NamedTuple):
    """A record that FLOPs are counted until. logged: the shape of its step, of a training record. ends: the steps until
    here are of that shape, or of an attempt that has ended."""

    step: int
    tokens: int
    logged: StepShape | None = None
    ends: bool = False


def training_flops(config: Config, records: Records) -> dict[int, int]:
    """Model FLOPs of all steps up to the step of each evaluation, each beginning of an attempt, the last record, and
    each training record before which or after which steps cost something else; passes counted, recomputation and
    evaluation not.

    A step costs what the mean of a task's rows does (`plan.mean_row`). Its shape is the curriculum's, where N is
    sampled the N that was drawn, or what the next training record of the attempt says where that is another (settings
    that were changed on the way), after the last one what that one says. Raises ConfigError and DataError where the
    task cannot be built.
    """
    mean = MeanRow(config)
    flops, step, tokens = 0, 0, 0
    found = {0: 0}
    other: StepShape | None = None  # of the steps, where it is not the curriculum's
    for stretch in _stretches(_marks(config, records)):
        planned: list[list[Steps]] = []
        for mark in stretch:
            planned.append(_curriculum(config, mean, range(step, mark.step), tokens))
            step, tokens = mark.step, mark.tokens
        shapes = [shape for steps in planned for shape, _ in steps]
        logged = stretch[-1].logged
        if logged and shapes:
            other = None if shapes[-1] == logged else logged
        for mark, steps in zip(stretch, planned, strict=True):
            flops += sum(number * mean.step_flops(other or shape) for shape, number in steps)
            found[mark.step] = flops
    return found


def _marks(config: Config, records: Records) -> Iterator[Mark]:
    """By step; of equal steps a training record comes first, for all else tells of what was after it."""
    step, tokens = records.column("step"), records.column("tokens")
    told = [Mark(r["step"], r["tokens"]) for r in records.evaluations]
    told += [Mark(r["step"], r["tokens"], ends=True) for r in records.attempts]
    told = sorted([*told, Mark(*records.furthest)], key=lambda mark: mark.step)
    kept = np.flatnonzero(_needed(config, records, np.array([mark.step for mark in told])))
    kept = kept[np.argsort(step[kept], kind="stable")]
    trained = (Mark(int(step[at]), int(tokens[at]), records.shape(int(at)), ends=True) for at in kept)
    return merge(trained, told, key=lambda mark: mark.step)


def _needed(config: Config, records: Records, other_steps: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The training records that are marks. Between records of one shape, in one stage of the curriculum and with no
    other mark between them, every step costs the same, so that the last one is enough."""
    step = records.column("step")
    if config.sleep.sample_passes or len(step) == 0 or bool((np.diff(step) < 0).any()):
        return np.ones(len(step), bool)
    stage = np.searchsorted(shape_starts(config), records.column("tokens"), side="right")
    passed = np.searchsorted(other_steps, step, side="left")  # other marks before each record
    same = np.ones(len(step) - 1, bool)
    for values in (stage, passed, *(records.column(name) for name in ("passes", "window", "batch"))):
        same &= values[1:] == values[:-1]
    needed = np.ones(len(step), bool)
    # A record is not needed where the one before it and the one after it are of its kind.
    needed[1:-1] = ~(same[:-1] & same[1:])
    return needed


def _stretches(marks: Iterable[Mark]) -> Iterator[list[Mark]]:
    """The marks cut after each that ends one."""
    stretch: list[Mark] = []
    for mark in marks:
        stretch.append(mark)
        if mark.ends:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _curriculum(config: Config, mean: MeanRow, steps: range, tokens: int) -> list[Steps]:
    """The shapes of these steps by the settings. tokens: that were seen before the first of them."""
    found: list[Steps] = []
    starts, at = shape_starts(config), steps.start
    while at < steps.stop:
        if config.sleep.sample_passes:
            shape, number = step_shape(config, tokens, at), 1
        else:
            shape, number = stage_shape(config, tokens), steps.stop - at
            later = starts[bisect_right(starts, tokens) :]
            if later:
                number = min(number, -(-(later[0] - tokens) // mean.step_tokens(shape)))
        found.append((shape, number))
        at, tokens = at + number, tokens + number * mean.step_tokens(shape)
    return found
