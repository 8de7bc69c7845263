"""The parts of the published code: norms, causal attention, and a head that is tied or not."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.hf.published.ouro import Ouro
from sleeptrain.hf.published.parts import MLP, Attention, Norm
from tests.hf.published.small import REFERENCES

SETTINGS = REFERENCES["ouro"][0] | REFERENCES["ouro"][1] | {"num_key_value_heads": 2}


@torch.no_grad()
def test_a_norm_scales_rows_to_one_size_and_multiplies() -> None:
    norm, x = Norm(8, 0.0), torch.randn(3, 8) * 100
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))
    norm.weight.fill_(2.0)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.full((3,), 4.0))


@pytest.mark.parametrize(("reach", "seen"), [(None, [0, 1, 2, 3, 4, 5]), (2, [4, 5]), (1, [5])])
@torch.no_grad()
def test_a_token_attends_to_itself_and_those_before_it(reach: int | None, seen: list[int]) -> None:
    attention, x = Attention(SETTINGS, bias=True, reach=reach), torch.randn(1, 7, 48)
    before = attention(x)[0, 5]
    changed = []
    for at in range(7):
        other = x.clone()
        other[0, at] += 1
        if not torch.equal(attention(other)[0, 5], before):
            changed.append(at)
    assert changed == seen


@torch.no_grad()
def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    attention = Attention(SETTINGS, bias=False)
    q, k = torch.randn(2, attention.width, dtype=torch.float64)
    places = torch.zeros(1, 9, 1, attention.width, dtype=torch.float64)
    turned_q, turned_k = (attention.rotated(places + t) for t in (q, k))
    scores = torch.einsum("qd,kd->qk", turned_q[0, :, 0], turned_k[0, :, 0])
    for back in range(4):
        along = scores.diagonal(-back)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(1, 9, 1))


@torch.no_grad()
def test_a_feed_forward_is_gated() -> None:
    mlp, x = MLP(SETTINGS), torch.randn(2, 48)
    gate = mlp.gate_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(gate * gate.sigmoid() * mlp.up_proj(x)))


@torch.no_grad()
def test_a_tied_head_is_the_embeddings() -> None:
    tied, own = (Ouro(SETTINGS | {"tie_word_embeddings": tie}) for tie in (True, False))
    x = torch.randn(1, 2, 48)
    torch.testing.assert_close(tied.head(x), x @ tied.model.embed_tokens.weight.T)
    assert "lm_head.weight" in dict(own.named_parameters()) and tied.lm_head is None
    assert own.lm_head is not None
    torch.testing.assert_close(own.head(x), x @ own.lm_head.weight.T)
    assert own.empty_memory() == [None] * 3


def test_each_pair_turns_slower_than_the_one_before() -> None:
    attention = Attention(SETTINGS | {"head_dim": 8, "rope_theta": 10_000.0}, bias=False)
    ones = torch.cat([torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)], dim=-1).double()
    turned = attention.rotated(ones)[0, 1, 0]
    rates = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    torch.testing.assert_close(turned, torch.cat([rates.cos(), rates.sin()]))
