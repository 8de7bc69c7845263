"""What torch knows of the operators around the cross entropy's kernels. tests/kernels runs the kernels."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops.fla_cross_entropy import cross_entropy, cross_entropy_backward


def test_losses_are_fp32_and_gradients_take_the_place_of_logits() -> None:
    with FakeTensorMode():
        logits, targets = torch.zeros(5, 7, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.long)
        losses, lse = cross_entropy(logits, targets)
        assert losses.shape == lse.shape == (5,) and losses.dtype == lse.dtype == torch.float32
        before = logits._version
        assert cross_entropy_backward(logits, targets, lse, losses) is None
        assert logits._version > before
