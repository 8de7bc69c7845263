"""Rotary positions: relative, partial, and invertible."""

from __future__ import annotations

import torch

from sleeptrain.model.rope import rope_tables, rotate, rotate_back


def test_only_the_first_dimensions_turn() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    turned = rotate(x, rope_tables(1, 4, 8, 0.5, 1e4, x))
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.isclose(turned[..., :4], x[..., :4]).any()
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_each_pair_turns_at_its_own_speed() -> None:
    """Four dimensions of a head turn and theta is 100: the pairs turn by 1 and by 1 / 10 radian a token."""
    x = torch.zeros(1, 3, 1, 8, dtype=torch.float64)
    x[..., :2] = 1
    turned, at = rotate(x, rope_tables(2, 3, 8, 0.5, 100.0, x))[0, :, 0], torch.arange(2, 5).double()
    expected = torch.stack([at.cos(), (at / 10).cos(), at.sin(), (at / 10).sin()], dim=-1)
    torch.testing.assert_close(turned[:, :4], expected)


def test_turning_back_is_the_inverse() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    tables = rope_tables(-2, 5, 8, 0.75, 1e4, x)
    torch.testing.assert_close(rotate_back(rotate(x, tables), tables), x)


def test_rows_may_be_at_different_positions() -> None:
    x = torch.randn(2, 3, 1, 8, dtype=torch.float64)
    tables = [rope_tables(first, 3, 8, 1.0, 1e4, x) for first in (0, 7)]
    cos, sin = (torch.stack(pair) for pair in zip(*tables, strict=True))
    each = torch.cat([rotate(x[row : row + 1], tables[row]) for row in range(2)])
    assert torch.equal(rotate(x, (cos, sin)), each)


def test_narrow_features_have_wide_tables_and_stay_narrow() -> None:
    x = torch.randn(1, 2, 1, 4).bfloat16()
    tables = rope_tables(0, 2, 4, 1.0, 1e4, x)
    assert tables[0].dtype == torch.float32 and rotate(x, tables).dtype == torch.bfloat16


def test_rotation_is_relative():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for first in (-3, 0, 50):
        tables = rope_tables(first, 6, 8, 0.5, 1e4, q)
        turned = [rotate(t.expand(1, 6, 1, 8), tables)[0, :, 0] for t in (q, k)]
        scores.append(turned[0] @ turned[1].T)
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    assert not torch.allclose(scores[0][0, 0], scores[0][0, 5])
