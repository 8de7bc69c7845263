"""Messages between stages: matched by their order, sent in one dtype, taken when they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from tests.parallel.threads import run_threads

FIRST, SECOND = (Message(Kind.FEATURES, micro_batch, 0, 0) for micro_batch in range(2))
CPU = torch.device("cpu")


def test_messages_are_matched_by_their_order_whenever_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(group: Any) -> list[torch.Tensor]:
        mailbox = Mailbox(group, torch.float32, CPU)
        if group.rank == 0:
            for value in (1.0, 2.0):
                mailbox.send(torch.full((2, 3), value), 1)
            mailbox.finish()
            return []
        for message in (FIRST, SECOND):
            mailbox.expect(message, (2, 3), 0)
        return [mailbox.take(message) for message in (SECOND, FIRST)]

    _, (second, first) = run_threads(monkeypatch, 2, run)
    assert first.tolist() == [[1.0] * 3] * 2 and second.tolist() == [[2.0] * 3] * 2


def test_a_message_is_laid_out_and_rounded_as_the_receiver_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of a round may be a transposed fp32 tensor of a graph."""

    def run(group: Any) -> torch.Tensor:
        mailbox = Mailbox(group, torch.bfloat16, CPU)
        if group.rank == 0:
            features = (torch.arange(6.0).view(2, 3) + 0.001).requires_grad_()
            mailbox.send(features.t(), 1)
            mailbox.finish()
            return features
        mailbox.expect(FIRST, (3, 2), 0)
        return mailbox.take(FIRST)

    sent, received = run_threads(monkeypatch, 2, run)
    assert received.dtype == torch.bfloat16 and not received.requires_grad
    assert torch.equal(received, sent.detach().t().bfloat16())


def test_a_message_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(group: Any) -> None:
        mailbox = Mailbox(group, torch.float32, CPU)
        if group.rank == 0:
            mailbox.send(torch.zeros(1), 1)
            return
        mailbox.expect(FIRST, (1,), 0)
        mailbox.take(FIRST)
        with pytest.raises(KeyError):
            mailbox.take(FIRST)

    run_threads(monkeypatch, 2, run)


def test_the_end_waits_for_messages_that_are_still_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        waited = 0

        def wait(self) -> None:
            self.waited += 1

        def is_completed(self) -> bool:
            return False

    slow = Slow()

    def run(group: Any) -> None:
        monkeypatch.setattr(torch.distributed, "isend", lambda *_: slow)
        mailbox = Mailbox(group, torch.float32, CPU)
        mailbox.send(torch.zeros(1), 0)
        mailbox.send(torch.zeros(1), 0)
        mailbox.finish()
        assert slow.waited == 2
        mailbox.finish()

    run_threads(monkeypatch, 1, run)
    assert slow.waited == 2
