"""Costs of tasks in the simulated time in which schedules are made and compared."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class Costs:
    """Times in one arbitrary unit; only their ratios matter.

    forward, backward: one layer on one token. A backward costs two forwards, plus one that runs the round again.
    head: the head and the loss on one token, in units of a layer.
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

    def time(self, r: Round, stages: PipelineStages, stage: int, backward: bool) -> float:
        """The time of one direction of a round on one stage."""
        head = self.head if r.loss and stage == stages.num_stages - 1 else 0.0
        each = self.backward if backward else self.forward
        return each * (stages.layers_on(r, stage) + head) * len(r.rows) * r.length
