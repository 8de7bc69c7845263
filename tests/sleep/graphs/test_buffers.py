from __future__ import annotations

import torch
from torch import nn

from sleeptrain.sleep.graphs.buffers import FixedGradients, Slot, copy_, zero_


def test_passes_of_all_lengths_share_memory_and_others_do_not() -> None:
    slot = Slot(None, 8)
    long, short = (slot.buffer("x", torch.zeros(2, n, 3), n) for n in (8, 5))
    assert long.shape == (2, 8, 3) and short.shape == (2, 5, 3) and short.is_contiguous()
    assert long.data_ptr() == short.data_ptr()
    others = [
        slot.buffer("y", torch.zeros(2, 8, 3), 8),
        slot.buffer("x", torch.zeros(2, 8, 3).double(), 8),
        slot.buffer("x", torch.zeros(2, 8, 4), 8),
        slot.buffer("x", torch.zeros(8), 8),
    ]
    assert len({t.data_ptr() for t in [long, *others]}) == 5


def test_gradients_keep_their_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    gradients = FixedGradients(model)
    assert gradients.begin()
    assert {*gradients.tensors} == {p for p in model.parameters() if p.requires_grad}
    first = {p: p.grad for p in gradients.tensors}
    for p in first:
        p.grad.fill_(1.0)
    assert not gradients.begin() and all(p.grad.eq(1.0).all() for p in first), "a gradient that is there is kept"
    model.zero_grad(set_to_none=True)
    assert not gradients.begin()
    assert all(p.grad is g and not g.any() for p, g in first.items())
    model[1].bias.grad = torch.zeros(2)
    assert gradients.begin() and not gradients.begin()
    model[0].bias.requires_grad_(True)
    assert gradients.begin() and model[0].bias.grad is not None
    model[0].weight.data = model[0].weight.data.clone()
    assert gradients.begin()


def test_copies_and_zeros() -> None:
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(1, dtype=torch.long)
    zero_([a, None])
    copy_([b, c], [torch.full((3,), 2.0), torch.tensor([7])])
    copy_([], [])
    zero_([])
    assert a.tolist() == [0, 0] and b.tolist() == [2, 2, 2] and c.tolist() == [7]
