"""The single-token step of a recurrence: equal to the token loop in fp64, and used only without a gradient."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.ops import dispatch, gated_delta_rule, ssd, step

EXACT = dict(rtol=1e-12, atol=1e-13)


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_gated_delta_rule_equals_the_token_loop(l2norm, begins):
    q, k, v, g, beta, S = draw((3, 1, 2, 5), (3, 1, 2, 5), (3, 1, 6, 4), (3, 1, 6), (3, 1, 6), (3, 6, 5, 4))
    inputs = (q, k, v, -g.abs(), beta.sigmoid())
    state = None if begins else S
    expected = gated_delta_rule(*inputs, initial_state=state, qk_l2norm=l2norm, implementation="reference")
    found = step.gated_delta_rule(*inputs, initial_state=state, qk_l2norm=l2norm)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("begins", [True, False])
def test_ssd_equals_the_token_loop(begins):
    C, B, x, dt, A, S = draw((3, 1, 2, 5), (3, 1, 2, 5), (3, 1, 6, 4), (3, 1, 6), (6,), (3, 6, 5, 4))
    inputs = (C, B, x, dt.abs(), -A.abs())
    state = None if begins else S
    expected = ssd(*inputs, initial_state=state, implementation="reference")
    for ours, theirs in zip(step.ssd(*inputs, initial_state=state), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_narrow_inputs_leave_a_wide_state():
    q, k, v, g, beta = (t.bfloat16() for t in draw((2, 1, 2, 4), (2, 1, 2, 4), (2, 1, 2, 3), (2, 1, 2), (2, 1, 2)))
    o, S = step.gated_delta_rule(q, k, v, -g.abs(), beta.sigmoid(), initial_state=None, qk_l2norm=True)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("tokens", "gradient", "taken"), [(1, False, True), (1, True, False), (2, False, False)])
def test_the_step_is_used_for_one_token_without_a_gradient(monkeypatch, tokens, gradient, taken):
    seen = []
    rule = step.gated_delta_rule
    monkeypatch.setattr(dispatch.step, "gated_delta_rule", lambda *a, **k: (seen.append(1), rule(*a, **k))[1])
    q, k, v, g, beta = draw((2, tokens, 2, 4), (2, tokens, 2, 4), (2, tokens, 2, 3), (2, tokens, 2), (2, tokens, 2))
    with torch.set_grad_enabled(gradient):
        gated_delta_rule(q, k, v, -g.abs(), beta.sigmoid())
    assert bool(seen) == taken
