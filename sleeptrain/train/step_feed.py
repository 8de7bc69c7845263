"""The batches of a run's steps. The next one is read and planned while a step runs.

All processes read in the same order. A thread plans the rounds of a batch that has been read, and makes the pipeline's
schedule, so that the step finds both ready. What the processes must know of the next step is part of the one exchange
of the step before it (`sleeptrain.sleep.totals`).
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from sleeptrain.config.schema import Config
from sleeptrain.data.ahead import Cancelled, in_thread
from sleeptrain.data.batch import Batch
from sleeptrain.data.peers import SharedReading
from sleeptrain.data.source import Source
from sleeptrain.distributed.world import World
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.step import Plans
from sleeptrain.sleep.totals import StepFacts, StepTotals, joined_facts, step_facts
from sleeptrain.train.engine import Engine
from sleeptrain.train.stopping import Stopping


class StepInputs(NamedTuple):
    """What a step needs: this process's rows, the totals of all rows, and the rounds of each micro-batch."""

    batch: Batch
    totals: StepTotals
    plans: Plans


@dataclass
class _Next:
    """The step that comes next.

    position, report: the data's position before the batch, and what it tells the log.
    batch: None if waiting was cancelled or reading failed. error: of reading; the step raises it, not the one before.
    plans: the result of the thread. totals: None until the processes have exchanged them.
    """

    shape: StepShape
    position: dict[str, Any]
    report: dict[str, Any]
    batch: Batch | None = None
    error: Exception | None = None
    plans: Future[Plans] | None = None
    totals: StepTotals | None = None

    def facts(self, config: Config, stops: bool) -> StepFacts:
        return step_facts(config, self.batch, () if self.plans is None else self.plans.result(), stops)


class StepFeed:
    """The inputs of a run's steps, in order.

    source: the data. reading: reads its batches. engine: plans them.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        source: Source,
        reading: Source | SharedReading,
        engine: Engine,
        stopping: Stopping,
    ) -> None:
        self._config, self._world, self._source, self.reading = config, world, source, reading
        self._engine, self._stopping = engine, stopping
        self._next: _Next | None = None

    def read(self, shape: StepShape) -> None:
        """Read the batch of the next step and let a thread plan it."""
        self.discard()
        self._next = following = _Next(shape, self._source.state_dict(), self._source.report())
        try:
            following.batch = self.reading.batch(shape.batch)
        except Cancelled:
            return
        except Exception as error:
            following.error = error
            return
        following.plans = in_thread(self._engine.plan, (following.batch, shape), "plan-ahead")

    def facts(self) -> StepFacts:
        """What this process tells the others of the next step, and whether it is to stop. Once a step.

        Raises the error of the thread that plans.
        """
        stops = self._stopping.step_begins()
        if self._next is not None:
            return self._next.facts(self._config, stops)
        return step_facts(self._config, None, (), stops)

    def agree_on(self, totals: StepTotals) -> None:
        """Take the totals of the next step, the same in all processes. If the run stops, its batch is given back."""
        stops = self._stopping.heed(totals.stopping > 0)
        if self._next is None:
            return
        self._next.totals = totals
        if stops or (totals.cancelled and self._next.error is None):
            self.discard()

    def take(self, shape: StepShape) -> StepInputs | None:
        """The inputs of the next step. None if the run is to stop, or if waiting for data was cancelled in a process.

        Without a batch that was read ahead it is read here, and the processes exchange their facts here.
        Raises the errors of reading and of planning.
        """
        if self._next is None or self._next.shape != shape:
            self.read(shape)
        following = self._next
        assert following is not None
        if following.error is not None:
            raise following.error
        if following.totals is None:
            facts = self.facts()
            self.agree_on(joined_facts(self._world, *self._world.sum_and_max(facts.sums, facts.largest)))
        if self._next is None:
            return None
        batch, plans, totals = following.batch, following.plans, following.totals
        assert batch is not None and plans is not None and totals is not None
        self._next = None
        return StepInputs(batch, totals, plans.result())

    def discard(self) -> None:
        """Give back the batch that was read ahead: the next step reads it again."""
        if self._next is not None:
            self._source.load_state_dict(self._next.position)
            self._next = None

    def position(self) -> dict[str, Any]:
        """The data's position after the last step that took a batch, for a checkpoint."""
        return self._source.state_dict() if self._next is None else self._next.position

    def report(self) -> dict[str, Any]:
        """What the source tells the log at that position."""
        return self._source.report() if self._next is None else self._next.report
