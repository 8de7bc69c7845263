"""Runs a schedule on this rank: the rounds of all sequences, and the messages between stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sleeptrain.parallel.pipeline.feature_flow import FeatureFlow, Held, Output
from sleeptrain.parallel.pipeline.graph import Message
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import Part, RoundOutputs, RunBackward, StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import Backward, Compute, Forward, Receive, Schedule, Send
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
        self._schedule, self._rank, self._flow = schedule, rank, FeatureFlow(schedule, rank)
        self._sequences, self._mailbox, self._dim, self._on_task = sequences, mailbox, dim, on_task
        # By micro-batch and round: what later passes of the window may read here.
        self._outputs: dict[int, dict[int, RoundOutputs]] = {}
        # By (micro-batch, round): gradients in its outputs, from readers on this stage.
        self._gradients: dict[tuple[int, int], RoundOutputs] = {}
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

    def _forward(self, seq: int, index: int) -> None:
        outputs = self._outputs.setdefault(seq, {})
        for expired in self._flow.expired(seq, index, outputs):
            del outputs[expired]
        entry = [Part(self._flow.round(seq, i).rows, self._take(seq, at)) for i, at in self._flow.reads(seq, index)]
        outputs[index] = self._sequences[seq].forward(index, entry, self._flow.is_trained(seq, index))
        for name, message in self._flow.passes_on(seq, index):
            self._outgoing[message] = _present(getattr(outputs[index], name))

    def _take(self, seq: int, place: Message | Held) -> torch.Tensor:
        """The features that lie there."""
        if isinstance(place, Held):
            return _present(getattr(self._outputs[seq][place.round_index], place.output))
        return self._mail.take(place)

    def _backward(self, seq: int, index: int, run_backward: RunBackward) -> None:
        gradients = self._gradients.pop((seq, index), RoundOutputs())
        for name, message in self._flow.gradients_in(seq, index):
            gradients = _add(gradients, name, self._mail.take(message))
        entry = self._sequences[seq].backward(index, gradients, run_backward)
        for place, part in zip(self._flow.gradients_out(seq, index), entry, strict=True):
            if isinstance(place, Held):
                so_far = self._gradients.get((seq, place.round_index), RoundOutputs())
                self._gradients[seq, place.round_index] = _add(so_far, place.output, part.features_RLD)
            else:
                self._outgoing[place] = part.features_RLD

    def _shape(self, message: Message) -> tuple[int, ...]:
        r = self._flow.shape_of(message)
        return len(r.rows), r.stop - r.start, self._dim


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a round reads an output that no round before it has made"
    return tensor


def _add(gradients: RoundOutputs, name: Output, gradient: torch.Tensor) -> RoundOutputs:
    so_far = getattr(gradients, name)
    return gradients._replace(**{name: gradient if so_far is None else so_far + gradient})
