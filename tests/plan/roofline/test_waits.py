"""Operators for which the host waits."""

from __future__ import annotations

import torch

from sleeptrain.plan.roofline.record import Recorder


def test_what_reads_a_tensor_back_is_seen() -> None:
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for call in (lambda: x.nonzero(), lambda: float(x[0]), lambda: x[mask], lambda: torch.tensor([1])):
        with Recorder() as recorder:
            call()
        assert recorder.waits


def test_work_on_tensors_alone_is_not() -> None:
    x, index = torch.ones(3), torch.zeros(2, dtype=torch.long)
    with Recorder() as recorder:
        (x[index] + 1).sum()
        torch.repeat_interleave(index, torch.ones_like(index), output_size=2)
    assert recorder.waits == []
