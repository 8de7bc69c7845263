"""The mixer against its definition, one token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sleeptrain.model.state import HARD, Boundary, Recurrent
from tests.models import tiny_model
from tests.sleep.oracle import causal_layout


def convolve(taps: list[torch.Tensor], weight_DW: torch.Tensor) -> torch.Tensor:
    return sum(weight_DW[:, w] * taps[w] for w in range(weight_DW.shape[1]))  # type: ignore[return-value]


def test_equals_its_definition_token_by_token() -> None:
    torch.manual_seed(0)
    m, x = tiny_model(["mamba2"]).blocks[0].mixer, torch.randn(1, 11, 16, dtype=torch.float64)
    S, tail = torch.randn(1, 4, 6, 8, dtype=torch.float64), torch.randn(1, 3, 56, dtype=torch.float64)
    found, state_after = m(x, Recurrent(S, tail), causal_layout(11), Boundary(carry_conv=True))
    state, taps = S[0], list(tail[0])
    for t, token in enumerate(x[0]):
        z, mixed, dt = (m.in_proj.weight @ token).split([32, 56, 4])
        taps = [*taps, mixed][-4:]
        v, B, C = F.silu(convolve(taps, m.conv_weight) + m.conv_bias).split([32, 12, 12])
        v, B, C = v.view(4, 8), B.view(2, 6).repeat_interleave(2, 0), C.view(2, 6).repeat_interleave(2, 0)
        dt = F.softplus(dt + m.dt_bias)
        state = state * torch.exp(-dt * m.A_log.exp())[:, None, None]
        state = state + torch.einsum("hk,hv->hkv", B, dt[:, None] * v)
        y = (torch.einsum("hk,hkv->hv", C, state) + m.D[:, None] * v).flatten()
        y = F.rms_norm(y * F.silu(z), (32,), m.norm.weight, 1e-6)
        torch.testing.assert_close(found[0, t], m.out_proj.weight @ y)
    torch.testing.assert_close(state_after.S_BHKV[0], state)
    torch.testing.assert_close(state_after.conv_BWD[0], torch.stack(taps[1:]))


def test_the_convolution_restarts_unless_it_is_carried() -> None:
    m, x = tiny_model(["mamba2"]).blocks[0].mixer, torch.randn(1, 5, 16, dtype=torch.float64)
    S, tail = torch.zeros(1, 4, 6, 8, dtype=torch.float64), torch.randn(1, 3, 56, dtype=torch.float64)
    restarted, state_after = m(x, Recurrent(S, tail), causal_layout(5), HARD)
    assert torch.equal(restarted, m(x, None, causal_layout(5), HARD)[0]) and state_after.conv_BWD is tail
    assert not torch.equal(m(x, Recurrent(S, tail), causal_layout(5), Boundary(carry_conv=True))[0], restarted)
