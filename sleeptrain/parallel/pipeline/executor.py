"""Runs a schedule on this rank: the rounds of all micro-batches, and the messages between stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sleeptrain.parallel.pipeline.feature_flow import FeatureFlow, Held, Output
from sleeptrain.parallel.pipeline.graph import AnyMessage, HeadMessage, Kind, Message
from sleeptrain.parallel.pipeline.head import HeadMicroBatch, RunBackward
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import Part, RoundOutputs, StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import (
    Backward,
    Compute,
    Forward,
    HeadBackward,
    HeadForward,
    Receive,
    Schedule,
    Send,
)
from sleeptrain.sleep.rounds import Round


class StageStep:
    """One step of rank `rank` of a schedule.

    micro_batches: this stage's part of each micro-batch; its state and loss are complete after `run`.
    mailbox: the messages of the step; None for a single stage.
    dim: D of the features.
    on_task: called with each task and its round, before the task waits for its inputs.
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
        self._outgoing: dict[AnyMessage, torch.Tensor] = {}
        # Where stages share the head, on the last one, by (micro-batch, round): between its tasks.
        self._head_inputs: dict[tuple[int, int], torch.Tensor] = {}
        self._log_sums: dict[tuple[int, int], torch.Tensor] = {}

    def run(self, run_backward: RunBackward) -> None:
        """Run all actions of the rank, in their order."""
        for action in self._schedule.ranks[self._rank]:
            if self._on_task is not None and not isinstance(action, Send | Receive):
                self._on_task(action, self._schedule.plans[action.micro_batch][action.round])
            match action:
                case Forward(mb, index):
                    self._forward(mb, index)
                case Backward(mb, index):
                    self._backward(mb, index, run_backward)
                case HeadForward(mb, index):
                    self._head_forward(mb, index)
                case HeadBackward(mb, index):
                    self._head_backward(mb, index, run_backward)
                case Send(peer, message):
                    self._mail.send(self._outgoing.pop(message), peer, self._form(message)[1])
                case Receive(peer, message):
                    shape, dtype = self._form(message)
                    self._mail.expect(message, shape, peer, dtype)
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
        made = self._micro_batches[mb].forward(index, entry, self._flow.is_trained(mb, index))
        if made.head_input_ND is not None:
            self._head_inputs[mb, index] = made.head_input_ND
            for part in self._others:
                self._outgoing[HeadMessage(Kind.HEAD_INPUT, mb, index, part)] = made.head_input_ND
        outputs[index] = made._replace(head_input_ND=None)
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

    def _head_forward(self, mb: int, index: int) -> None:
        micro_batch, head = self._micro_batches[mb], self._head(mb)
        if self._rank < self._last:
            x_ND = self._mail.take(HeadMessage(Kind.HEAD_INPUT, mb, index, self._rank))
            self._outgoing[HeadMessage(Kind.STATISTICS, mb, index, self._rank)] = head.forward(index, x_ND)
            return
        own = head.forward(index, self._head_inputs.pop((mb, index)))
        others = [self._mail.take(HeadMessage(Kind.STATISTICS, mb, index, part)) for part in self._others]
        loss, log_sums_N = head.join(index, [*others, own])
        micro_batch.add_loss(index, loss)
        if micro_batch.trains:
            self._log_sums[mb, index] = log_sums_N
            for part in self._others:
                self._outgoing[HeadMessage(Kind.LOG_SUMS, mb, index, part)] = log_sums_N

    def _head_backward(self, mb: int, index: int, run_backward: RunBackward) -> None:
        head = self._head(mb)
        if self._rank < self._last:
            log_sums_N = self._mail.take(HeadMessage(Kind.LOG_SUMS, mb, index, self._rank))
            gradient = head.backward(index, log_sums_N, run_backward)
            self._outgoing[HeadMessage(Kind.HEAD_GRADIENT, mb, index, self._rank)] = gradient
            return
        own = head.backward(index, self._log_sums.pop((mb, index)), run_backward)
        total = own.to(torch.promote_types(own.dtype, torch.float32))
        for part in self._others:
            total += self._mail.take(HeadMessage(Kind.HEAD_GRADIENT, mb, index, part))
        so_far = self._gradients.get((mb, index), RoundOutputs())
        self._gradients[mb, index] = so_far._replace(head_input_ND=total.to(own.dtype))

    def _head(self, mb: int) -> HeadMicroBatch:
        head = self._micro_batches[mb].head
        assert head is not None, "the schedule shares the head, the model does not"
        return head

    @property
    def _last(self) -> int:
        return len(self._schedule.ranks) - 1

    @property
    def _others(self) -> range:
        """The stages ahead of the last one, each with a part of the head."""
        return range(self._last)

    def _form(self, message: AnyMessage) -> tuple[tuple[int, ...], torch.dtype | None]:
        """The shape and the dtype of a message; None: the dtype of features."""
        if isinstance(message, HeadMessage):
            return self._head(message.micro_batch).form(message)
        r = self._flow.shape_of(message)
        return (len(r.rows), r.length, self._dim), None


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a round reads an output that no round before it has made"
    return tensor


def _add(gradients: RoundOutputs, name: Output, gradient: torch.Tensor) -> RoundOutputs:
    so_far = getattr(gradients, name)
    return gradients._replace(**{name: gradient if so_far is None else so_far + gradient})
