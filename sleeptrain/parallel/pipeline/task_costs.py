"""What the work of a round costs in the simulated time that schedules are made and judged in."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class Costs:
    """Times in any one unit; only their proportions matter.

    forward, backward: of one layer on one token; a backward is twice a forward and runs the round again. head: the head
    and the loss on one token, in layers. message: from the end of a task until its features are there for the reader.
    Raises ConfigError for a time that is not positive (head, message: negative).
    """

    forward: float = 1.0
    backward: float = 3.0
    head: float = 0.0
    message: float = 0.0

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) <= 0 or min(self.head, self.message) < 0:
            raise ConfigError(f"{self}: forward and backward must take time, head and message must not be negative")

    def time(self, r: Round, stages: PipelineStages, stage: int, backward: bool) -> float:
        """Of one direction of a round on one stage."""
        head = self.head if r.loss and stage == stages.num_stages - 1 else 0.0
        each = self.backward if backward else self.forward
        return each * (stages.layers_on(r, stage) + head) * len(r.rows) * (r.stop - r.start)
