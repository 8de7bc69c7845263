"""Runs a schedule on this rank: the rounds of all sequences, and the messages between stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import Part, RoundOutputs, RunBackward, StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import Backward, Compute, Forward, Receive, Schedule, Send
from sleeptrain.parallel.pipeline.stages import feature_sources, num_trained
from sleeptrain.sleep.rounds import Round


class StageStep:
    """One step of rank `rank` of a schedule.

    sequences: this stage's share of each of them, whose states and losses are complete after `run`. dim: of features.
    on_task: told of each forward and backward with its round, before it waits for what it reads.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        sequences: Sequence[StageMicroBatch],
        mailbox: Mailbox | None,
        dim: int,
        on_task: Callable[[Compute, Round], None] | None = None,
    ) -> None:
        self._schedule, self._stages, self._rank = schedule, schedule.stages, rank
        self._sequences, self._mailbox, self._dim, self._on_task = sequences, mailbox, dim, on_task
        self._sources = [feature_sources(plan) for plan in schedule.plans]
        self._num_trained = [num_trained(plan) for plan in schedule.plans]
        self._left: dict[
            int, dict[int, RoundOutputs]
        ] = {}  # by sequence and round: what its window's passes may read here
        self._gradients: dict[tuple[int, int], RoundOutputs] = {}  # in what a round left, from readers on this stage
        self._outgoing: dict[Message, torch.Tensor] = {}

    def run(self, run_backward: RunBackward) -> None:
        """All of the rank's actions, in their order."""
        for action in self._schedule.ranks[self._rank]:
            if self._on_task is not None and isinstance(action, Forward | Backward):
                self._on_task(action, self._schedule.plans[action.seq][action.round])
            match action:
                case Forward(seq, index):
                    self._forward(seq, index)
                case Backward(seq, index):
                    self._backward(seq, index, run_backward)
                case Send(peer, message):
                    self._mail.send(self._outgoing.pop(message), peer)
                case Receive(peer, message):
                    self._mail.expect(message, self._shape(message), peer)
        if self._mailbox is not None:
            self._mailbox.finish()

    @property
    def _mail(self) -> Mailbox:
        assert self._mailbox is not None, "a schedule of several stages needs a mailbox"
        return self._mailbox

    @property
    def _ring(self) -> bool:
        """Whether features that are fed back travel, from the core's last stage to its first."""
        return self._stages.first_core != self._stages.last_core

    def _forward(self, seq: int, index: int) -> None:
        r = self._schedule.plans[seq][index]
        here = self._left.setdefault(seq, {})
        for old in [i for i in here if self._schedule.plans[seq][i].window != r.window]:
            del here[old]
        left = self._sequences[seq].forward(index, self._entry(seq, index), self._is_trained(seq, index))
        here[index] = left
        if self._continues(r):
            assert left.top_RLD is not None
            self._outgoing[Message(Kind.FEATURES, seq, index, index)] = left.top_RLD
        if self._ring and self._rank == self._stages.last_core:
            for reader in self._readers(seq, index):
                assert left.core_output_RLD is not None
                self._outgoing[Message(Kind.FEATURES, seq, index, reader)] = left.core_output_RLD

    def _entry(self, seq: int, index: int) -> list[Part]:
        """What a round reads here, at its turn."""
        plan, r = self._schedule.plans[seq], self._schedule.plans[seq][index]
        if self._rank != self._stages.visited(r).start:
            return [Part(r.rows, self._mail.take(Message(Kind.FEATURES, seq, index, index)))]
        if not r.is_wake and not r.feeds_back:
            return [Part(plan[i].rows, _have(self._left[seq][i].core_input_RLD)) for i in self._wakes(seq, index)]
        if self._ring:
            messages = [(i, Message(Kind.FEATURES, seq, i, index)) for i in self._sources[seq][index]]
            return [Part(plan[i].rows, self._mail.take(message)) for i, message in messages]
        return [Part(plan[i].rows, _have(self._left[seq][i].core_output_RLD)) for i in self._sources[seq][index]]

    def _backward(self, seq: int, index: int, run_backward: RunBackward) -> None:
        r = self._schedule.plans[seq][index]
        come_back = self._gradients.pop((seq, index), RoundOutputs())
        if self._continues(r):
            come_back = come_back._replace(top_RLD=self._mail.take(Message(Kind.GRADIENT, seq, index, index)))
        if self._ring and self._rank == self._stages.last_core:
            for reader in filter(lambda reader: self._is_trained(seq, reader), self._readers(seq, index)):
                gradient = self._mail.take(Message(Kind.GRADIENT, seq, reader, index))
                come_back = come_back._replace(core_output_RLD=_plus(come_back.core_output_RLD, gradient))
        entry = self._sequences[seq].backward(index, come_back, run_backward)
        self._give_back(seq, index, entry)

    def _give_back(self, seq: int, index: int, entry: Sequence[Part]) -> None:
        """The gradients in what a round read, to those who left it."""
        r = self._schedule.plans[seq][index]
        if self._rank != self._stages.visited(r).start:
            self._outgoing[Message(Kind.GRADIENT, seq, index, index)] = entry[0].features_RLD
            return
        readable = self._sources[seq][index] if r.is_wake or r.feeds_back else self._wakes(seq, index)
        for source, part in zip(readable, entry, strict=True):
            if r.feeds_back and self._ring:
                self._outgoing[Message(Kind.GRADIENT, seq, index, source)] = part.features_RLD
                continue
            so_far = self._gradients.get((seq, source), RoundOutputs())
            if r.feeds_back:
                so_far = so_far._replace(core_output_RLD=_plus(so_far.core_output_RLD, part.features_RLD))
            else:
                so_far = so_far._replace(core_input_RLD=_plus(so_far.core_input_RLD, part.features_RLD))
            self._gradients[seq, source] = so_far

    def _continues(self, r: Round) -> bool:
        """Whether the round goes on on the next stage."""
        return self._rank + 1 in self._stages.visited(r)

    def _is_trained(self, seq: int, index: int) -> bool:
        """Whether a gradient comes back to the round: none does behind a sequence's last loss."""
        return index < self._num_trained[seq]

    def _readers(self, seq: int, index: int) -> list[int]:
        """The rounds that read what a round left of the core."""
        return [reader for reader, sources in enumerate(self._sources[seq]) if index in sources]

    def _wakes(self, seq: int, index: int) -> tuple[int, ...]:
        """The wake rounds of a round's window that share rows with it: passes without feedback read their input."""
        plan, r = self._schedule.plans[seq], self._schedule.plans[seq][index]
        same = (i for i in range(index) if plan[i].is_wake and plan[i].window == r.window)
        return tuple(i for i in same if set(plan[i].rows) & set(r.rows))

    def _shape(self, message: Message) -> tuple[int, ...]:
        """Of features, those of the round that left them; a gradient has the shape of what it is the gradient in."""
        r = self._schedule.plans[message.seq][message.source if message.kind is Kind.FEATURES else message.reader]
        return len(r.rows), r.stop - r.start, self._dim


def _have(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a pass reads what no round before it has left"
    return tensor


def _plus(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if one is None else one + other
