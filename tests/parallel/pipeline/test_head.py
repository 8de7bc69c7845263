"""A micro-batch's losses in parts of the head, without processes: what is kept, sent and read."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.parallel.pipeline.graph import HeadMessage, Kind
from sleeptrain.parallel.pipeline.head import Form, HeadMicroBatch
from sleeptrain.sleep.loop import ReadLogits
from sleeptrain.sleep.rounds import Round
from tests.models import tiny_config
from tests.parallel.pipeline.cases import plan

TARGETS = torch.tensor([1, 5, 16, 3])


def parts(trains: bool, read_logits: ReadLogits | None = None) -> list[HeadMicroBatch]:
    config, result = tiny_config(["gated_deltanet", "attention"]), []
    for index in range(2):
        model = Hybrid(config, range(index, index + 1), VocabularyPart(index, 2))
        model.init_weights(0)
        result.append(HeadMicroBatch(model, plan(1, 1), [TARGETS], 2.0, trains, read_logits))
    return result


def test_messages_have_the_forms_that_are_announced() -> None:
    x_ND, heads = torch.randn(4, 16), parts(trains=True)
    statistics = [head.forward(0, x_ND) for head in heads]
    loss, log_sums = heads[1].join(0, statistics)
    gradients = [head.backward(0, log_sums, lambda objective: objective.backward()) for head in heads]
    assert loss.dim() == 0
    sent = {Kind.HEAD_INPUT: x_ND, Kind.STATISTICS: statistics[0], Kind.LOG_SUMS: log_sums}
    sent[Kind.HEAD_GRADIENT] = gradients[0]
    for kind, tensor in sent.items():
        assert heads[0].form(HeadMessage(kind, 0, 0, 0)) == Form(tuple(tensor.shape), tensor.dtype)
    with pytest.raises(KeyError):
        heads[0].backward(0, log_sums, lambda objective: objective.backward())


def test_the_gradient_is_divided() -> None:
    """Half of that of the summed loss."""
    heads = parts(trains=True)
    x_ND = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.cat([head._model.head_weight for head in heads])
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(x_ND @ weight.t(), TARGETS, reduction="sum"), x_ND)
    _, log_sums = heads[1].join(0, [head.forward(0, x_ND.detach()) for head in heads])
    found = sum(head.backward(0, log_sums, lambda objective: objective.backward()) for head in heads)
    torch.testing.assert_close(2 * found, wanted[0], rtol=1e-4, atol=1e-6)


def test_logits_are_read_at_once_and_nothing_is_kept() -> None:
    read: list[tuple[int, torch.Size, torch.Tensor]] = []

    def note(_: Round, first: int, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        read.append((first, logits_NV.shape, targets_N))

    heads = parts(trains=False, read_logits=note)
    sent = [head.forward(0, torch.randn(4, 16)) for head in heads]
    vocab_size = tiny_config(["gated_deltanet"]).vocab_size
    for part, logits in enumerate(sent):
        assert heads[1].form(HeadMessage(Kind.STATISTICS, 0, 0, part)) == Form(tuple(logits.shape), logits.dtype)
    heads[1].join(0, sent)
    assert [(first, tuple(shape)) for first, shape, _ in read] == [(0, (4, vocab_size))]
    assert not any(head._kept for head in heads)
