"""The features that a round reads and sends on a stage, and the way of their gradients.

The executor follows these rules, and the plan counts a rank's memory by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import Schedule
from sleeptrain.parallel.pipeline.stages import feature_sources, num_trained
from sleeptrain.sleep.rounds import Round

# Fields of `RoundOutputs`.
Output = Literal["top_RLD", "core_input_RLD", "core_output_RLD"]


class Held(NamedTuple):
    """An output of a round that stays on the stage, or the gradient of that output."""

    round_index: int
    output: Output


class FeatureFlow:
    """The rules for one rank of a schedule. (mb, index) names a round: micro-batch, and index in that one's plan."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._plans, self._stages, self._rank = schedule.plans, schedule.stages, rank
        plans = {id(plan): plan for plan in schedule.plans}  # micro-batches mostly share one plan
        sources = {key: feature_sources(plan) for key, plan in plans.items()}
        trained = {key: num_trained(plan) for key, plan in plans.items()}
        self._sources = [sources[id(plan)] for plan in schedule.plans]
        self._num_trained = [trained[id(plan)] for plan in schedule.plans]

    def round(self, mb: int, index: int) -> Round:
        return self._plans[mb][index]

    def is_trained(self, mb: int, index: int) -> bool:
        """True if the round has a backward. Rounds after the last loss of the micro-batch get no gradient."""
        return index < self._num_trained[mb]

    def expired(self, mb: int, index: int, held: Iterable[int]) -> list[int]:
        """The rounds among `held` whose outputs neither this round nor a later one reads: rounds of other windows."""
        return [i for i in held if self.round(mb, i).window != self.round(mb, index).window]

    def reads(self, mb: int, index: int) -> list[tuple[int, Message | Held]]:
        """The features that a round reads, as (index of their source round, place); empty if it embeds tokens."""
        r = self.round(mb, index)
        if self._rank != self._stages.visited(r).start:
            return [(index, Message(Kind.FEATURES, mb, index, index))]
        if not r.is_wake and not r.feeds_back:
            return [(i, Held(i, "core_input_RLD")) for i in self._wakes(mb, index)]
        if self._is_ring:
            return [(i, Message(Kind.FEATURES, mb, i, index)) for i in self._sources[mb][index]]
        return [(i, Held(i, "core_output_RLD")) for i in self._sources[mb][index]]

    def passes_on(self, mb: int, index: int) -> list[tuple[Output, Message]]:
        """The outputs that a round sends: to the next stage, and to the core's first stage for later passes."""
        outputs: list[tuple[Output, Message]] = []
        if self._goes_on(mb, index):
            outputs.append(("top_RLD", Message(Kind.FEATURES, mb, index, index)))
        return outputs + [
            ("core_output_RLD", Message(Kind.FEATURES, mb, index, reader)) for reader in self._readers(mb, index)
        ]

    def gradients_in(self, mb: int, index: int) -> list[tuple[Output, Message]]:
        """The gradients of the outputs that a round sends. The backward of the round waits for these messages."""
        gradients: list[tuple[Output, Message]] = []
        if self._goes_on(mb, index):
            gradients.append(("top_RLD", Message(Kind.GRADIENT, mb, index, index)))
        readers = [reader for reader in self._readers(mb, index) if self.is_trained(mb, reader)]
        return gradients + [("core_output_RLD", Message(Kind.GRADIENT, mb, reader, index)) for reader in readers]

    def gradients_out(self, mb: int, index: int) -> list[Message | Held]:
        """The destination of the gradient of each entry of `reads`, in the same order."""
        return [self._way_back(mb, index, place) for _, place in self.reads(mb, index)]

    def shape_of(self, message: Message) -> Round:
        """The round whose features have the shape of the message: a gradient has the shape of its features."""
        return self.round(message.micro_batch, message.source if message.kind is Kind.FEATURES else message.reader)

    @property
    def _is_ring(self) -> bool:
        """True if fed-back features are sent from the core's last stage to its first."""
        return self._stages.first_core != self._stages.last_core

    def _goes_on(self, mb: int, index: int) -> bool:
        """True if the next stage runs the round too."""
        return self._rank + 1 in self._stages.visited(self.round(mb, index))

    def _readers(self, mb: int, index: int) -> list[int]:
        """Indices of the later passes to which this stage sends the core's output of a round."""
        if not self._is_ring or self._rank != self._stages.last_core:
            return []
        return [reader for reader, sources in enumerate(self._sources[mb]) if index in sources]

    def _wakes(self, mb: int, index: int) -> list[int]:
        """The wake rounds of the same window that share rows. Passes without feedback read the core's input there."""
        plan, r = self._plans[mb], self.round(mb, index)
        same_window = [i for i in range(index) if plan[i].is_wake and plan[i].window == r.window]
        return [i for i in same_window if set(plan[i].rows) & set(r.rows)]

    def _way_back(self, mb: int, index: int, place: Message | Held) -> Message | Held:
        return place if isinstance(place, Held) else Message(Kind.GRADIENT, mb, index, place.source)
