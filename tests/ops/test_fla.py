from __future__ import annotations

import pytest
import torch

from sleeptrain.ops import fla, reference, ssd
from tests.ops.cases import delta_inputs, outcome, per_sequence, resets, ssd_inputs, worst


def test_the_rule_gets_scaled_queries_and_keys_of_unit_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(q, k, v, g, beta, S, scale):
        o, S = reference.gated_delta_rule(q, k, v, g, beta, initial_state=S)
        return o * scale * q.shape[-1] ** 0.5, S  # the reference scales too

    def unit(x, eps):
        factor = torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
        return x * factor, factor

    monkeypatch.setattr(fla.fla_delta_rule, "gated_delta_rule", per_sequence(rule, options=1))
    monkeypatch.setattr(fla.fla_delta_rule, "l2norm", unit)
    tensors, reset = delta_inputs(2, 9, 2, 4, 3, 5, dtype=torch.float32), resets(2, 9)
    tensors[0], tensors[1] = (x.detach().mul(3.0).requires_grad_() for x in tensors[:2])
    options = {"reset_BT": reset, "qk_l2norm": True}
    found = outcome(lambda *x: fla.gated_delta_rule(*x[:5], initial_state=x[5], **options), tensors)
    expected = outcome(lambda *x: reference.gated_delta_rule(*x[:5], initial_state=x[5], **options), tensors)
    assert worst(found, expected) < 1e-5


def test_ssd_is_gated_linear_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q, k, v, g, S, scale):
        outputs = []
        for t in range(q.shape[1]):
            S = S * g[:, t, :, None, None].exp() + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return torch.stack(outputs, dim=1), S

    monkeypatch.setattr(fla.fla_linear_attention, "gated_linear_attention", per_sequence(attention, options=1))
    tensors, reset = ssd_inputs(2, 9, 2, 4, 3, 5, dtype=torch.float32), resets(2, 9)
    found = outcome(lambda *x: fla.ssd(*x[:5], initial_state=x[5], reset_BT=reset), tensors)
    expected = outcome(lambda *x: ssd(*x[:5], initial_state=x[5], reset_BT=reset, implementation="reference"), tensors)
    assert worst(found, expected) < 1e-5
