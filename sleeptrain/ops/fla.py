"""The recurrences by flash-linear-attention's Triton kernels, as the operators of `fla_delta_rule` and its like.

The kernels read documents as sequences of one long row, with one state for each sequence: `Segments`.
"""

from __future__ import annotations

import torch

from sleeptrain.ops import fla_delta_rule, fla_linear_attention
from sleeptrain.ops.segments import Segments, run_on_segments

L2_EPS = 1e-6


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTGV: torch.Tensor,
    g_BTG: torch.Tensor,
    beta_BTG: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    segments: Segments | None = None,
    qk_l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sleeptrain.ops.gated_delta_rule` on a GPU. Raises ConfigError if flash-linear-attention is missing."""
    q, k = (x.to(v_BTGV.dtype).contiguous() for x in (q_BTHK, k_BTHK))
    if qk_l2norm:
        q, k = fla_delta_rule.l2norm(q, L2_EPS)[0], fla_delta_rule.l2norm(k, L2_EPS)[0]
    scale = k.shape[-1] ** -0.5

    def operator(*args: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return fla_delta_rule.gated_delta_rule(*args, scale)

    # The copies are made here: the operator saves its arguments, and a slice would keep the tensor it is cut from.
    tensors = (q, k, v_BTGV.contiguous(), g_BTG.float().contiguous(), beta_BTG.contiguous())
    return run_on_segments(operator, tensors, initial_state, reset_BT, segments)


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sleeptrain.ops.ssd` on a GPU, as gated linear attention without a scale. Raises ConfigError as above."""
    shared = x_BTHV.shape[2] // B_BTNK.shape[2]
    C_BTHK, B_BTHK = (x.to(x_BTHV.dtype).repeat_interleave(shared, dim=2) for x in (C_BTNK, B_BTNK))
    written = (x_BTHV * dt_BTH.unsqueeze(-1)).to(x_BTHV.dtype)
    g_BTH = dt_BTH.float() * A_H.float()

    def operator(*args: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return fla_linear_attention.gated_linear_attention(*args, 1.0)

    tensors = tuple(x.contiguous() for x in (C_BTHK, B_BTHK, written, g_BTH))
    return run_on_segments(operator, tensors, initial_state, reset_BT, segments)
