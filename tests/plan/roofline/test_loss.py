"""The loss of a large vocabulary, as torch computes it on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import LinearCrossEntropyOptions

from sleeptrain.plan.roofline.loss import loss_as_on_gpu
from sleeptrain.plan.roofline.record import Recorder


def record(on_gpu: bool) -> Recorder:
    options = LinearCrossEntropyOptions(batch_chunk_size=32, chunking_method=None)
    recorder = Recorder(head=True)
    with FakeTensorMode():
        x, weight = (torch.empty(n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (64, 1000))
        target = torch.zeros(64, dtype=torch.long)
        if on_gpu:
            with recorder, loss_as_on_gpu():
                F.linear_cross_entropy(x, weight, target, reduction="none", options=options).sum()
        else:
            with recorder:
                F.linear_cross_entropy(x, weight, target, reduction="none", options=options).sum()
    return recorder


def test_a_gpu_multiplies_bf16_where_a_cpu_makes_wide_copies() -> None:
    products = {on: [c for c in record(on).calls if c.name == "mm"] for on in (False, True)}
    assert [len(calls) for calls in products.values()] == [2, 2], "a product for each part of the rows"
    assert all(c.wide for c in products[False]) and not any(c.wide for c in products[True])
    assert all(c.flops == 2 * 32 * 16 * 1000 for calls in products.values() for c in calls)


def test_the_choice_of_the_device_comes_back() -> None:
    record(on_gpu=True)
    assert all(c.wide for c in record(on_gpu=False).calls if c.name == "mm")
