"""The JetBlock mixer of Jet-Nemotron (arXiv 2508.15884, section 2.3): Gated DeltaNet with a dynamic convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.decay import KeepsDecayWide, decay_and_write
from sleeptrain.model.layout import Layout
from sleeptrain.model.norm import GatedRMSNorm
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import dynamic_causal_conv, gated_delta_rule


class Jet(KeepsDecayWide, nn.Module):
    """The recurrence of `GatedDeltaNet`, with q = silu(W_q x) and k = silu(W_k x), which pass no convolution.

    The values pass one whose kernel is made of the features: kernel_t = W_2 silu(W_1 x_t) + bias, a tap for each
    channel and each of the last `conv_size` tokens. The rows of `kernel_out` are tap by tap, the oldest token's first.
    The state is [B, num_heads, head_k_dim, head_v_dim].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.jet
        key_dim, self.value_dim = c.num_heads * c.head_k_dim, c.num_heads * c.head_v_dim
        self.q_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, self.value_dim, bias=False)
        self.kernel_in = nn.Linear(config.dim, c.kernel_dim, bias=False)
        self.kernel_out = nn.Linear(c.kernel_dim, c.conv_size * self.value_dim, bias=True)
        self.in_proj_b = nn.Linear(config.dim, c.num_heads, bias=False)
        self.in_proj_a = nn.Linear(config.dim, c.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.in_proj_z = nn.Linear(config.dim, self.value_dim, bias=False)
        self.norm = GatedRMSNorm(c.head_v_dim, c.norm_eps, gate_first=False)
        self.out_proj = nn.Linear(self.value_dim, config.dim, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, state: LayerState, layout: Layout, boundary: Boundary, state_only: bool = False
    ) -> tuple[torch.Tensor | None, Recurrent]:
        """x_BTD, state -> (y_BTD, state after the last token). Pads write nothing."""
        c = self.config
        S, tail = (state.S_BHKV, state.conv_BWD) if isinstance(state, Recurrent) else (None, None)
        v, new_tail = dynamic_causal_conv(
            self.v_proj(x_BTD),
            self.kernel_out(F.silu(self.kernel_in(x_BTD))).unflatten(-1, (c.conv_size, -1)),
            initial_state=tail if boundary.carry_conv else None,
            reset_BT=layout.reset_RL,
            valid_BT=layout.valid_RL,
        )
        o, S = gated_delta_rule(
            F.silu(self.q_proj(x_BTD)).unflatten(-1, (c.num_heads, c.head_k_dim)),
            F.silu(self.k_proj(x_BTD)).unflatten(-1, (c.num_heads, c.head_k_dim)),
            v.unflatten(-1, (c.num_heads, c.head_v_dim)),
            *decay_and_write(self.in_proj_a(x_BTD), self.in_proj_b(x_BTD), self.A_log, self.dt_bias, layout.valid_RL),
            initial_state=S,
            reset_BT=layout.reset_RL,
            qk_l2norm=True,
        )
        left = Recurrent(S, new_tail if boundary.carry_conv else tail)
        if state_only:
            return None, left
        z = self.in_proj_z(x_BTD).unflatten(-1, (c.num_heads, c.head_v_dim))
        return self.out_proj(self.norm(o, z).flatten(2)), left
