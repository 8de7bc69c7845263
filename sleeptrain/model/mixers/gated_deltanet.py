"""The Gated DeltaNet mixer (arXiv 2412.06464) as in Qwen3.5: fused short convolution, delta rule, gated norm."""

from __future__ import annotations

import torch
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.decay import KeepsDecayWide, decay_and_write
from sleeptrain.model.layout import Layout
from sleeptrain.model.norm import GatedRMSNorm
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import causal_conv, gated_delta_rule


class GatedDeltaNet(KeepsDecayWide, nn.Module):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K).

    b = sigmoid(W_b x), twice that with `allow_neg_eigval` (arXiv 2411.12537),
    log a = -exp(A_log) softplus(W_a x + dt_bias); q, k and v pass a short causal convolution with SiLU; q and k have
    unit length. The rows of `in_proj_qkv` are [q | k | v]. Key head i serves the value heads
    i*G/H .. (i+1)*G/H - 1. The state is [B, num_v_heads, head_k_dim, head_v_dim].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.gated_deltanet
        self.key_dim, self.value_dim = c.num_k_heads * c.head_k_dim, c.num_v_heads * c.head_v_dim
        self.conv_dim = 2 * self.key_dim + self.value_dim
        self.in_proj_qkv = nn.Linear(config.dim, self.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(config.dim, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(config.dim, c.num_v_heads, bias=False)
        self.in_proj_a = nn.Linear(config.dim, c.num_v_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, c.conv_size))
        self.A_log = nn.Parameter(torch.empty(c.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_v_heads))
        self.strongest = 2.0 if c.allow_neg_eigval else 1.0
        self.norm = GatedRMSNorm(c.head_v_dim, c.norm_eps or config.norm_eps, gate_first=False)
        self.out_proj = nn.Linear(self.value_dim, config.dim, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, state: LayerState, layout: Layout, boundary: Boundary, state_only: bool = False
    ) -> tuple[torch.Tensor | None, Recurrent]:
        """x_BTD, state -> (y_BTD, state after the last token). Pads write nothing."""
        c = self.config
        S, tail = (state.S_BHKV, state.conv_BWD) if isinstance(state, Recurrent) else (None, None)
        mixed, new_tail = causal_conv(
            self.in_proj_qkv(x_BTD),
            self.conv_weight,
            initial_state=tail if boundary.carry_conv else None,
            reset_BT=layout.reset_RL,
            valid_BT=layout.valid_RL,
        )
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        o, S = gated_delta_rule(
            q.unflatten(-1, (c.num_k_heads, c.head_k_dim)),
            k.unflatten(-1, (c.num_k_heads, c.head_k_dim)),
            v.unflatten(-1, (c.num_v_heads, c.head_v_dim)),
            *decay_and_write(
                self.in_proj_a(x_BTD), self.in_proj_b(x_BTD), self.A_log, self.dt_bias, layout.valid_RL, self.strongest
            ),
            initial_state=S,
            reset_BT=layout.reset_RL,
            qk_l2norm=True,
        )
        left = Recurrent(S, new_tail if boundary.carry_conv else tail)
        if state_only:
            return None, left
        z = self.in_proj_z(x_BTD).unflatten(-1, (c.num_v_heads, c.head_v_dim))
        return self.out_proj(self.norm(o, z).flatten(2)), left
