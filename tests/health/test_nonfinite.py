from __future__ import annotations

import pytest
import torch

from sleeptrain.health.nonfinite import locate_nonfinite
from sleeptrain.sleep.curriculum import StepShape
from tests.models import random_batch, tiny_model
from tests.sleep.test_step import config

SHAPE = StepShape(passes=2, window=4, batch=1)


@pytest.mark.parametrize("micro", [0, 1])
def test_the_window_the_pass_and_the_layer_of_a_forward_are_named(micro):
    model, batch = tiny_model(), random_batch([[0] * 12, [0] * 12])
    batch.tokens_BT[:] = torch.arange(12) % 4
    batch.tokens_BT[0, 9] = 16  # a token that stands only in window 3
    model.embedding.weight.data[16] = torch.nan
    where = locate_nonfinite(model, batch, SHAPE, config(train__micro_batch=micro), None)
    assert where == "window 3, pass 1, layer 0 (features)"


def test_a_sleep_pass_is_named(monkeypatch):
    model, batch = tiny_model(), random_batch([[0] * 8])
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        if len(calls) == 2:  # the first window's second pass
            features, state = output
            return features * torch.inf, state
        return output

    model.blocks[1].register_forward_hook(poison, prepend=True)
    where = locate_nonfinite(model, batch, SHAPE, config(), None)
    assert where == "window 1, pass 2, layer 1 (features)"


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is_finite():
    model, batch = tiny_model(), random_batch([[0] * 8])

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.inf

    hook = lambda module, inputs: (Explode.apply(inputs[0]), *inputs[1:])  # noqa: E731
    model.blocks[2].register_forward_pre_hook(hook)
    where = locate_nonfinite(model, batch, StepShape(1, 8, 1), config(), None)
    assert where == "window 1, pass 1, layer 1 (gradient of its features)"
