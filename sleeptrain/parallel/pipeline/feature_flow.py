"""Which features a round reads on a stage, what it passes on, and where the gradients go.

The executor acts by these rules, and the plan counts by them what a rank holds.
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
    """An output of a round that stays on the stage, or the gradient in it."""

    round_index: int
    output: Output


class FeatureFlow:
    """The rules for one rank of a schedule. A round is named by (seq, index): its micro-batch and its place in it."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._plans, self._stages, self._rank = schedule.plans, schedule.stages, rank
        self._sources = [feature_sources(plan) for plan in schedule.plans]
        self._num_trained = [num_trained(plan) for plan in schedule.plans]

    def round(self, seq: int, index: int) -> Round:
        return self._plans[seq][index]

    def is_trained(self, seq: int, index: int) -> bool:
        """True if the round has a backward: no gradient comes back after the last loss of its micro-batch."""
        return index < self._num_trained[seq]

    def expired(self, seq: int, index: int, held: Iterable[int]) -> list[int]:
        """The rounds among `held` whose outputs no round from this one on reads: those of other windows."""
        return [i for i in held if self.round(seq, i).window != self.round(seq, index).window]

    def reads(self, seq: int, index: int) -> list[tuple[int, Message | Held]]:
        """(index of the round that made them, place) for the features that a round reads; none if it embeds tokens."""
        r = self.round(seq, index)
        if self._rank != self._stages.visited(r).start:
            return [(index, Message(Kind.FEATURES, seq, index, index))]
        if not r.is_wake and not r.feeds_back:
            return [(i, Held(i, "core_input_RLD")) for i in self._wakes(seq, index)]
        if self._is_ring:
            return [(i, Message(Kind.FEATURES, seq, i, index)) for i in self._sources[seq][index]]
        return [(i, Held(i, "core_output_RLD")) for i in self._sources[seq][index]]

    def passes_on(self, seq: int, index: int) -> list[tuple[Output, Message]]:
        """The outputs of a round that are sent: to the next stage, and to the core's first stage for later passes."""
        found: list[tuple[Output, Message]] = []
        if self._goes_on(seq, index):
            found.append(("top_RLD", Message(Kind.FEATURES, seq, index, index)))
        return found + [
            ("core_output_RLD", Message(Kind.FEATURES, seq, index, reader)) for reader in self._readers(seq, index)
        ]

    def gradients_in(self, seq: int, index: int) -> list[tuple[Output, Message]]:
        """The gradients in these outputs, which the backward of a round waits for."""
        found: list[tuple[Output, Message]] = []
        if self._goes_on(seq, index):
            found.append(("top_RLD", Message(Kind.GRADIENT, seq, index, index)))
        readers = [reader for reader in self._readers(seq, index) if self.is_trained(seq, reader)]
        return found + [("core_output_RLD", Message(Kind.GRADIENT, seq, reader, index)) for reader in readers]

    def gradients_out(self, seq: int, index: int) -> list[Message | Held]:
        """Where the gradient in each of `reads` goes, in their order."""
        return [self._way_back(seq, index, place) for _, place in self.reads(seq, index)]

    def shape_of(self, message: Message) -> Round:
        """The round whose features have the shape of what is sent: a gradient has that of the features it is for."""
        return self.round(message.seq, message.source if message.kind is Kind.FEATURES else message.reader)

    @property
    def _is_ring(self) -> bool:
        """True if features that are fed back travel, from the core's last stage to its first."""
        return self._stages.first_core != self._stages.last_core

    def _goes_on(self, seq: int, index: int) -> bool:
        """True if the next stage runs the round too."""
        return self._rank + 1 in self._stages.visited(self.round(seq, index))

    def _readers(self, seq: int, index: int) -> list[int]:
        """The later passes that get the core's output of a round from this stage."""
        if not self._is_ring or self._rank != self._stages.last_core:
            return []
        return [reader for reader, sources in enumerate(self._sources[seq]) if index in sources]

    def _wakes(self, seq: int, index: int) -> list[int]:
        """The wake rounds of a round's window that share rows with it: passes without feedback read their input."""
        plan, r = self._plans[seq], self.round(seq, index)
        same = [i for i in range(index) if plan[i].is_wake and plan[i].window == r.window]
        return [i for i in same if set(plan[i].rows) & set(r.rows)]

    def _way_back(self, seq: int, index: int, place: Message | Held) -> Message | Held:
        return place if isinstance(place, Held) else Message(Kind.GRADIENT, seq, index, place.source)
