"""Runs a schedule on this rank: the rounds of all micro-batches, and the messages between stages."""

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

    micro_batches: this stage's part of each micro-batch; its state and loss are complete after `run`.
    mailbox: the messages of the step; None for a single stage.
    dim: D of the features.
    on_task: called with each forward and backward and its round, before the task waits for its inputs.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        micro_batches: Sequence[StageMicroBatch],
        mailbox: Mailbox | None,
        dim: int,
        on_task: Callable[[Compute, Round], None] | None = None,
    ) -> None:
        self._schedule, self._rank, self._flow = schedule, rank, FeatureFlow(schedule, rank)
        self._micro_batches, self._mailbox, self._dim, self._on_task = micro_batches, mailbox, dim, on_task
        # By micro-batch and round: outputs that later passes of the window may read on this stage.
        self._outputs: dict[int, dict[int, RoundOutputs]] = {}
        # By (micro-batch, round): gradients of the round's outputs, from the rounds on this stage that read them.
        self._gradients: dict[tuple[int, int], RoundOutputs] = {}
        self._outgoing: dict[Message, torch.Tensor] = {}

    def run(self, run_backward: RunBackward) -> None:
        """Run all actions of the rank, in their order."""
        for action in self._schedule.ranks[self._rank]:
            if self._on_task is not None and isinstance(action, Forward | Backward):
                self._on_task(action, self._schedule.plans[action.micro_batch][action.round])
            match action:
                case Forward(mb, index):
                    self._forward(mb, index)
                case Backward(mb, index):
                    self._backward(mb, index, run_backward)
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

    def _forward(self, mb: int, index: int) -> None:
        outputs = self._outputs.setdefault(mb, {})
        for expired in self._flow.expired(mb, index, outputs):
            del outputs[expired]
        entry = [Part(self._flow.round(mb, i).rows, self._take(mb, place)) for i, place in self._flow.reads(mb, index)]
        outputs[index] = self._micro_batches[mb].forward(index, entry, self._flow.is_trained(mb, index))
        for name, message in self._flow.passes_on(mb, index):
            self._outgoing[message] = _present(getattr(outputs[index], name))

    def _take(self, mb: int, place: Message | Held) -> torch.Tensor:
        """The features at a place: an output held on this stage, or a message."""
        if isinstance(place, Held):
            return _present(getattr(self._outputs[mb][place.round_index], place.output))
        return self._mail.take(place)

    def _backward(self, mb: int, index: int, run_backward: RunBackward) -> None:
        gradients = self._gradients.pop((mb, index), RoundOutputs())
        for name, message in self._flow.gradients_in(mb, index):
            gradients = _add(gradients, name, self._mail.take(message))
        entry = self._micro_batches[mb].backward(index, gradients, run_backward)
        for place, part in zip(self._flow.gradients_out(mb, index), entry, strict=True):
            if isinstance(place, Held):
                so_far = self._gradients.get((mb, place.round_index), RoundOutputs())
                self._gradients[mb, place.round_index] = _add(so_far, place.output, part.features_RLD)
            else:
                self._outgoing[place] = part.features_RLD

    def _shape(self, message: Message) -> tuple[int, ...]:
        r = self._flow.shape_of(message)
        return len(r.rows), r.length, self._dim


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a round reads an output that no round before it has made"
    return tensor


def _add(gradients: RoundOutputs, name: Output, gradient: torch.Tensor) -> RoundOutputs:
    so_far = getattr(gradients, name)
    return gradients._replace(**{name: gradient if so_far is None else so_far + gradient})
