"""The recurrences for one token without a gradient, for decoding; no chunks."""

from __future__ import annotations

import torch

from sleeptrain.ops.gated_delta_rule import L2_EPS


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTGV: torch.Tensor,
    g_BTG: torch.Tensor,
    beta_BTG: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    qk_l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.gated_delta_rule` for T = 1: (o_BTGV in v's dtype, S_BGKV in fp32 or wider)."""
    dtype = _wide(q_BTHK, k_BTHK, v_BTGV, g_BTG, beta_BTG, initial_state)
    (batch, _, heads, key_dim), (value_heads, value_dim) = k_BTHK.shape, v_BTGV.shape[2:]
    q, k = (_spread(_unit(x.to(dtype)) if qk_l2norm else x.to(dtype), value_heads // heads) for x in (q_BTHK, k_BTHK))
    S = _first(initial_state, k.new_empty(batch * value_heads, key_dim, value_dim))
    decay, beta = (x.to(dtype).reshape(-1, 1, 1) for x in (g_BTG.exp(), beta_BTG))
    S = S * decay
    written = beta * (v_BTGV.to(dtype).reshape(-1, 1, value_dim) - k @ S)
    S = torch.baddbmm(S, k.transpose(1, 2), written)
    o = (q @ S) * key_dim**-0.5
    return o.view(v_BTGV.shape).to(v_BTGV.dtype), S.view(batch, value_heads, key_dim, value_dim)


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.ssd` for T = 1: (y_BTHV in x's dtype, S_BHKV in fp32 or wider)."""
    dtype = _wide(C_BTNK, B_BTNK, x_BTHV, dt_BTH, A_H, initial_state)
    (batch, _, groups, key_dim), (heads, value_dim) = B_BTNK.shape, x_BTHV.shape[2:]
    C, B = (_spread(x.to(dtype), heads // groups) for x in (C_BTNK, B_BTNK))
    S = _first(initial_state, B.new_empty(batch * heads, key_dim, value_dim))
    dt = dt_BTH.to(dtype)
    written = (dt.unsqueeze(-1) * x_BTHV.to(dtype)).reshape(-1, 1, value_dim)
    S = torch.baddbmm(S * (dt * A_H.to(dtype)).exp().reshape(-1, 1, 1), B.transpose(1, 2), written)
    return (C @ S).view(x_BTHV.shape).to(x_BTHV.dtype), S.view(batch, heads, key_dim, value_dim)


def _wide(*tensors: torch.Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _spread(x_BTHK: torch.Tensor, times: int) -> torch.Tensor:
    """[B, 1, H, K] -> [B * G, 1, K], one row for each value head. times: value heads of a key head, G / H."""
    x = x_BTHK if times == 1 else x_BTHK.repeat_interleave(times, dim=2)
    return x.reshape(-1, 1, x.shape[-1])


def _first(initial_state: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if initial_state is None else initial_state.to(like.dtype).reshape(like.shape)
