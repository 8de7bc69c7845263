"""The recurrences one token at a time, in the inputs' dtype: the oracle for the other implementations, best in fp64."""

from __future__ import annotations

import torch


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTGV: torch.Tensor,
    g_BTG: torch.Tensor,
    beta_BTG: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of arXiv 2412.06464, equation 10. Returns (o_BTGV, S_BGKV), both in v's dtype."""
    if qk_l2norm:
        q_BTHK, k_BTHK = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q_BTHK, k_BTHK))
    batch, num_tokens, num_heads, key_dim = k_BTHK.shape
    value_heads, value_dim = v_BTGV.shape[2:]
    q_BTGK, k_BTGK = (x.repeat_interleave(value_heads // num_heads, dim=2) for x in (q_BTHK, k_BTHK))
    S = _first_state(initial_state, v_BTGV, (batch, value_heads, key_dim, value_dim))
    outputs = []
    for t in range(num_tokens):
        S = _drop(S, reset_BT, t) * g_BTG[:, t, :, None, None].exp()
        recalled = torch.einsum("bgk,bgkv->bgv", k_BTGK[:, t], S)
        written = beta_BTG[:, t, :, None] * (v_BTGV[:, t] - recalled)
        S = S + torch.einsum("bgk,bgv->bgkv", k_BTGK[:, t], written)
        outputs.append(torch.einsum("bgk,bgkv->bgv", q_BTGK[:, t], S) * key_dim**-0.5)
    return torch.stack(outputs, dim=1), S


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of arXiv 2405.21060, section 2, with a scalar decay for each head.

    Returns (y_BTHV, S_BHKV), both in x's dtype.
    """
    batch, num_tokens, num_heads, value_dim = x_BTHV.shape
    num_groups, key_dim = B_BTNK.shape[2:]
    C_BTHK, B_BTHK = (x.repeat_interleave(num_heads // num_groups, dim=2) for x in (C_BTNK, B_BTNK))
    S = _first_state(initial_state, x_BTHV, (batch, num_heads, key_dim, value_dim))
    outputs = []
    for t in range(num_tokens):
        S = _drop(S, reset_BT, t) * (dt_BTH[:, t] * A_H).exp()[..., None, None]
        S = S + torch.einsum("bhk,bhv->bhkv", B_BTHK[:, t], dt_BTH[:, t, :, None] * x_BTHV[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", C_BTHK[:, t], S))
    return torch.stack(outputs, dim=1), S


def _first_state(initial_state: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_zeros(shape) if initial_state is None else initial_state.to(like.dtype)


def _drop(S_BHKV: torch.Tensor, reset_BT: torch.Tensor | None, t: int) -> torch.Tensor:
    """S with zeros for rows in which a document starts at token t. Masked, because a product would keep a NaN of S."""
    return S_BHKV if reset_BT is None else S_BHKV.masked_fill(reset_BT[:, t, None, None, None], 0.0)
