"""Costs of tasks in the simulated time in which schedules are made and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.graph import Direction
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.rounds import Round

# Where stages share the head, its tasks take at least this share of a layer's time: an order by time needs some.
LEAST_HEAD = 1e-3


@dataclass(frozen=True)
class Costs:
    """Times in one arbitrary unit; only their ratios matter.

    forward, backward: one layer on one token. A backward costs two forwards, plus one that runs the round again.
    head: the head and the loss on one token, in units of a layer. On the last stage a round that runs again runs them
        again. Where stages share the head, each has an equal part of it, whose backward costs two forwards.
    message: from the end of a task until its reader has the message.
    Raises ConfigError unless forward and backward are positive, and head and message at least 0.
    """

    forward: float = 1.0
    backward: float = 3.0
    head: float = 0.0
    message: float = 0.0

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) <= 0 or min(self.head, self.message) < 0:
            raise ConfigError(f"{self}: forward and backward must take time, head and message must not be negative")

    def time(self, r: Round, stages: PipelineStages, stage: int, direction: Direction) -> float:
        """The time of one direction of a round on one stage."""
        tokens = len(r.rows) * r.length
        if direction in (Direction.HEAD_FORWARD, Direction.HEAD_BACKWARD):
            forwards = 1 if direction is Direction.HEAD_FORWARD else 2
            return forwards * self.forward * max(self.head / stages.num_stages, LEAST_HEAD) * tokens
        head = self.head if r.loss and stage == stages.num_stages - 1 and not stages.split_head else 0.0
        each = self.backward if direction is Direction.BACKWARD else self.forward
        return each * (stages.layers_on(r, stage) + head) * tokens


class TaskTimes:
    """The times of a step's tasks. Micro-batches mostly share one plan, so each time is worked out once for a plan."""

    def __init__(self, plans: Sequence[Sequence[Round]], stages: PipelineStages, costs: Costs) -> None:
        self._plans, self._stages, self._costs = plans, stages, costs
        self._plan_of = [id(rounds) for rounds in plans]
        self._known: dict[tuple[int, int, int, int], float] = {}

    def of(self, direction: Direction, micro_batch: int, index: int, stage: int) -> float:
        """index: of the round in the plan of its micro-batch."""
        key = (direction, self._plan_of[micro_batch], index, stage)
        if (time := self._known.get(key)) is None:
            time = self._costs.time(self._plans[micro_batch][index], self._stages, stage, direction)
            self._known[key] = time
        return time
