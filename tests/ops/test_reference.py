"""The token loops, the reference of all other implementations, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.ops import reference


def column(*values: float) -> torch.Tensor:
    """Tokens of one row with one head of width 1."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_gated_delta_rule_of_two_tokens() -> None:
    """S = 3 decays to 1.5, is corrected by half of 4 - 1.5 * 2 along k = 2; it then decays to 1.25, and k is 0."""
    g, beta = torch.tensor([[[0.5], [0.5]]], dtype=torch.float64).log(), torch.tensor([[[0.5], [1.0]]]).double()
    S = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    o, last = reference.gated_delta_rule(
        column(1.0, 10.0), column(2.0, 0.0), column(4.0, 9.0), g, beta, initial_state=S
    )
    assert o.flatten().tolist() == pytest.approx([2.5, 12.5])
    assert last.item() == pytest.approx(1.25)


def test_ssd_of_two_tokens() -> None:
    """S = 2 decays by exp(dt A) = 1/2, then dt B x is added."""
    dt, A = torch.tensor([[[1.0], [2.0]]]).double(), torch.tensor([0.5]).double().log()
    S = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    y, last = reference.ssd(column(1.0, 3.0), column(5.0, 1.0), column(1.0, 4.0), dt, A, initial_state=S)
    assert y.flatten().tolist() == pytest.approx([6.0, 3 * (6.0 / 4 + 8.0)])
    assert last.item() == pytest.approx(9.5)


def test_a_document_starts_with_an_empty_state() -> None:
    """Even where the state before it holds a NaN."""
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    S = torch.full((1, 1, 1, 1), float("nan"), dtype=torch.float64)
    reset = torch.tensor([[True, False]])
    token = column(1.0, 1.0)
    o, _ = reference.gated_delta_rule(token, token, token, 0 * ones, ones, initial_state=S, reset_BT=reset)
    y, _ = reference.ssd(token, token, token, ones, 0 * ones[0, 0], initial_state=S, reset_BT=reset)
    assert o.flatten().tolist() == [1.0, 1.0] and y.flatten().tolist() == [1.0, 2.0]


def test_heads_share_keys_with_their_neighbours_and_queries_are_scaled() -> None:
    q = torch.ones(1, 1, 2, 4, dtype=torch.float64)
    k = torch.stack([torch.eye(4)[0], torch.eye(4)[1]]).double().view(1, 1, 2, 4)
    v = torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 1, 4, 1)
    zero = torch.zeros(1, 1, 4, dtype=torch.float64)
    o, S = reference.gated_delta_rule(q, k, v, zero, zero + 1)
    assert o.flatten().tolist() == [0.5, 1.0, 1.5, 2.0]
    assert S[0, :, :, 0].nonzero()[:, 1].tolist() == [0, 0, 1, 1]


def test_keys_and_queries_get_unit_length_on_request() -> None:
    q = k = torch.full((1, 1, 1, 4), 3.0, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    _, S = reference.gated_delta_rule(q, k, one[..., None], 0 * one, one, qk_l2norm=True)
    assert S.flatten().tolist() == pytest.approx([0.5] * 4, abs=1e-6)
