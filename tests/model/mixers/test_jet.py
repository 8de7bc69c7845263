"""The Jet mixer against its definition, one token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.jet import Jet
from sleeptrain.model.state import Boundary, Recurrent
from tests.models import tiny_config, tiny_model
from tests.sleep.oracle import causal_layout


def jet_by_tokens(m: Jet, x_TD: torch.Tensor, S: torch.Tensor, taps: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs [T, D] of one row and the state after its last token, from the state and the last values before it."""
    c, outputs = m.config, []
    H, K, V, W = c.num_heads, c.head_k_dim, c.head_v_dim, c.conv_size
    for x in x_TD:
        q, k = (F.silu(p.weight @ x).view(H, K) for p in (m.q_proj, m.k_proj))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        taps = [*taps, m.v_proj.weight @ x][-W:]
        kernel = (m.kernel_out.weight @ F.silu(m.kernel_in.weight @ x) + m.kernel_out.bias).view(W, H * V)
        v = F.silu(sum(kernel[w] * taps[w] for w in range(W))).view(H, V)
        decay = torch.exp(-m.A_log.exp() * F.softplus(m.in_proj_a.weight @ x + m.dt_bias))
        beta = torch.sigmoid(m.in_proj_b.weight @ x)
        S = S * decay[:, None, None]
        S = S + torch.einsum("hk,hv->hkv", k, beta[:, None] * (v - torch.einsum("hk,hkv->hv", k, S)))
        o = torch.einsum("hk,hkv->hv", q, S) * K**-0.5
        o = F.rms_norm(o, (V,), m.norm.weight, c.norm_eps) * F.silu((m.in_proj_z.weight @ x).view(H, V))
        outputs.append(m.out_proj.weight @ o.flatten())
    return torch.stack(outputs), S


def test_equals_its_definition_token_by_token():
    model = tiny_model(["jet"])
    mixer, c = model.blocks[0].mixer, model.config.jet
    torch.manual_seed(0)
    x, S, tail = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((1, 37, 16), (1, c.num_heads, c.head_k_dim, c.head_v_dim), (1, 3, c.num_heads * c.head_v_dim))
    )
    found, state_after = mixer(x, Recurrent(S, tail), causal_layout(37), Boundary(carry_conv=True))
    expected, last = jet_by_tokens(mixer, x[0], S[0], list(tail[0]))
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(state_after.S_BHKV[0], last)
    inputs = [x, S, tail, *mixer.parameters()]
    direction, towards = torch.randn_like(expected), torch.randn_like(last)
    ours = torch.autograd.grad((found[0] * direction).sum() + (state_after.S_BHKV[0] * towards).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum() + (last * towards).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_convolution_restarts_unless_it_is_carried():
    model = tiny_model(["jet"])
    mixer = model.blocks[0].mixer
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    first, _ = mixer(x, None, causal_layout(5), Boundary())
    tail = torch.randn(1, 3, 40, dtype=torch.float64)
    S = torch.zeros(1, 4, 6, 10, dtype=torch.float64)
    restarted, state_after = mixer(x, Recurrent(S, tail), causal_layout(5), Boundary())
    assert torch.equal(restarted, first) and state_after.conv_BWD is tail
    assert not torch.equal(mixer(x, Recurrent(S, tail), causal_layout(5), Boundary(carry_conv=True))[0], first)


def test_a_fresh_kernel_is_static_and_learns_to_be_dynamic():
    model = Hybrid(tiny_config(["jet"]))
    model.init_weights(0)
    mixer = model.blocks[0].mixer
    assert not mixer.kernel_out.weight.any() and mixer.kernel_out.bias.abs().min() > 0
    y, _ = mixer(torch.randn(1, 9, 16), None, causal_layout(9), Boundary())
    y.sum().backward()
    assert mixer.kernel_out.weight.grad.abs().sum() > 0
