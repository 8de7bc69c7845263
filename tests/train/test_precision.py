from __future__ import annotations

import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.train.step import forward_backward
from tests.models import random_batch, tiny_config
from tests.train.test_step import config


def test_bf16_keeps_the_memory_the_loss_and_the_gradients_wide():
    """bf16 autocast rounds the products; S, the decays and the loss stay fp32, and the loss is that of fp32 to 1 %."""
    model = Hybrid(tiny_config())
    model.init_weights(0)
    batch = random_batch([[0] * 16, [0] * 7 + [1] * 9], continues=[True, True])
    shape = StepShape(passes=3, window=4, batch=2)
    wide = forward_backward(model, batch, shape, config(), None)
    reference = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    seen = []
    model.blocks[0].mlp.up_proj.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    narrow = forward_backward(model, batch, shape, config(train__precision="bf16"), None)
    assert set(seen) == {torch.bfloat16}
    assert all(s.S_BHKV.dtype == torch.float32 for s in narrow.state.layers if s is not None)
    assert abs(narrow.loss - wide.loss) < 0.01 * wide.loss and narrow.loss != wide.loss
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - reference[name]).norm() / reference[name].norm().clamp(min=1e-6)
        assert error < 0.1, f"{name}: {error:.2f}"
