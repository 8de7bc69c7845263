"""Attention that sees the last tokens only."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.mixers.spec import Precision
from sleeptrain.model.state import Boundary
from tests.model.test_block import features, run_block
from tests.models import tiny_config, tiny_model
from tests.sleep.oracle import causal_layout


def test_the_spec_knows_the_reach() -> None:
    spec = mixer_spec(tiny_config(["sliding_attention"]), "sliding_attention")
    assert [spec.reach(tokens) for tokens in (1, 3, 9)] == [1, 3, 3]
    by_mask, by_bounds = Precision(4, True), Precision(2, True)
    assert [spec.saved_mask_bytes(length, by_mask) for length in (3, 4)] == [0, 64]
    assert spec.saved_mask_bytes(4, by_bounds) == 0 and spec.saved_mask_bytes(4, Precision(2, False)) == 32


@pytest.mark.parametrize("sliding", [None, 4, 6])
def test_a_sliding_layer_sees_the_last_tokens_only(sliding):
    """Windows of 6 tokens; a reach of 3 stays inside a window, or crosses its start where eviction slides."""
    config = tiny_config(["sliding_attention"])
    config.attention.sliding_window = 3
    model = Hybrid(config).double()
    model.init_weights(0)
    mixer, boundary = model.blocks[0].mixer, Boundary(sliding_window=sliding)
    x = torch.cat([features(6), features(6).flip(1)], dim=1).requires_grad_()
    _, state = mixer(x[:, :6], None, causal_layout(6), boundary)
    y, retained = mixer(x[:, 6:], state, causal_layout(6), boundary)
    for t in range(6):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        first = max(6 + t - 2, 6 if sliding is None else 0)
        assert seen.nonzero().flatten().tolist() == list(range(first, 6 + t + 1))
    assert retained is None if sliding is None else retained.k_BLGD.shape[1] == 3


def test_a_reach_beyond_the_window_is_full_attention():
    narrow, full = tiny_model(["sliding_attention"]), tiny_model(["attention"])
    full.load_state_dict(narrow.state_dict())
    assert torch.equal(run_block(narrow, features(3)), run_block(full, features(3)))
