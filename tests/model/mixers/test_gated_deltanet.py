"""The mixer against its definition, one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import HARD, Boundary, Recurrent
from tests.models import tiny_config, tiny_model
from tests.sleep.oracle import causal_layout


def convolve(taps: list[torch.Tensor], weight_DW: torch.Tensor) -> torch.Tensor:
    return sum(weight_DW[:, w] * taps[w] for w in range(weight_DW.shape[1]))  # type: ignore[return-value]


@pytest.mark.parametrize("negative", [True, False])
def test_equals_its_definition_token_by_token(negative: bool) -> None:
    config = tiny_config(["gated_deltanet"])
    config.gated_deltanet.allow_neg_eigval = negative
    torch.manual_seed(0)
    model = Hybrid(config).double()
    model.init_weights(0)
    m, x = model.blocks[0].mixer, torch.randn(1, 11, 16, dtype=torch.float64)
    S, tail = torch.randn(1, 4, 8, 6, dtype=torch.float64), torch.randn(1, 3, 56, dtype=torch.float64)
    found, state_after = m(x, Recurrent(S, tail), causal_layout(11), Boundary(carry_conv=True))
    state, taps, strongest = S[0], list(tail[0]), 2.0 if negative else 1.0
    for t, token in enumerate(x[0]):
        taps = [*taps, m.in_proj_qkv.weight @ token][-4:]
        q, k, v = F.silu(convolve(taps, m.conv_weight)).split([16, 16, 24])
        q, k = (n.view(2, 8) / (n.view(2, 8).square().sum(-1, keepdim=True) + 1e-6).sqrt() for n in (q, k))
        q, k, v = q.repeat_interleave(2, 0), k.repeat_interleave(2, 0), v.view(4, 6)
        decay = torch.exp(-m.A_log.exp() * F.softplus(m.in_proj_a.weight @ token + m.dt_bias))
        beta = strongest * torch.sigmoid(m.in_proj_b.weight @ token)
        state = state * decay[:, None, None]
        recalled = torch.einsum("hk,hkv->hv", k, state)
        state = state + torch.einsum("hk,hv->hkv", k, beta[:, None] * (v - recalled))
        o = F.rms_norm(torch.einsum("hk,hkv->hv", q, state) * 8**-0.5, (6,), m.norm.weight, config.norm_eps)
        o = o * F.silu((m.in_proj_z.weight @ token).view(4, 6))
        torch.testing.assert_close(found[0, t], m.out_proj.weight @ o.flatten())
    torch.testing.assert_close(state_after.S_BHKV[0], state)
    torch.testing.assert_close(state_after.conv_BWD[0], torch.stack(taps[1:]))


def test_the_convolution_restarts_unless_it_is_carried() -> None:
    m, x = tiny_model(["gated_deltanet"]).blocks[0].mixer, torch.randn(1, 5, 16, dtype=torch.float64)
    S, tail = torch.zeros(1, 4, 8, 6, dtype=torch.float64), torch.randn(1, 3, 56, dtype=torch.float64)
    restarted, state_after = m(x, Recurrent(S, tail), causal_layout(5), HARD)
    assert torch.equal(restarted, m(x, None, causal_layout(5), HARD)[0]) and state_after.conv_BWD is tail
    assert not torch.equal(m(x, Recurrent(S, tail), causal_layout(5), Boundary(carry_conv=True))[0], restarted)
