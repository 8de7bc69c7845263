"""The Mamba-2 mixer (state-space duality, arXiv 2405.21060)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.decay import KeepsDecayWide
from sleeptrain.model.layout import Layout
from sleeptrain.model.norm import GatedRMSNorm
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import causal_conv, ssd


class Mamba2(KeepsDecayWide, nn.Module):
    """S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t; dt = softplus(W_dt x + dt_bias), A < 0.

    The rows of `in_proj` are [z | x | B | C | dt]; x, B and C pass a short causal convolution with SiLU. The state is
    [B, num_heads, state_dim, head_dim].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.mamba2
        self.inner_dim, self.group_dim = c.num_heads * c.head_dim, c.num_groups * c.state_dim
        self.conv_dim = self.inner_dim + 2 * self.group_dim
        self.in_proj = nn.Linear(config.dim, self.inner_dim + self.conv_dim + c.num_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, c.conv_size))
        self.conv_bias = nn.Parameter(torch.zeros(self.conv_dim))
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.D = nn.Parameter(torch.ones(c.num_heads))
        self.norm = GatedRMSNorm(self.inner_dim, config.norm_eps, gate_first=True)
        self.out_proj = nn.Linear(self.inner_dim, config.dim, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, state: LayerState, layout: Layout, boundary: Boundary, state_only: bool = False
    ) -> tuple[torch.Tensor | None, Recurrent]:
        """x_BTD, state -> (y_BTD, state after the last token). Pads write nothing."""
        c = self.config
        S, tail = (state.S_BHKV, state.conv_BWD) if isinstance(state, Recurrent) else (None, None)
        z, mixed, dt = self.in_proj(x_BTD).split([self.inner_dim, self.conv_dim, c.num_heads], dim=-1)
        mixed, new_tail = causal_conv(
            mixed,
            self.conv_weight,
            bias_D=self.conv_bias,
            initial_state=tail if boundary.carry_conv else None,
            reset_BT=layout.reset_RL,
            valid_BT=layout.valid_RL,
        )
        x_BTHV, B_BTNK, C_BTNK = self.split_mixed(mixed)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if layout.valid_RL is not None:
            dt = dt.masked_fill(~layout.valid_RL.unsqueeze(-1), 0.0)
        y, S = ssd(
            C_BTNK,
            B_BTNK,
            x_BTHV,
            dt,
            -self.A_log.to(wide).exp(),
            initial_state=S,
            reset_BT=layout.reset_RL,
        )
        left = Recurrent(S, new_tail if boundary.carry_conv else tail)
        if state_only:
            return None, left
        y = (y + self.D.to(y.dtype).unsqueeze(-1) * x_BTHV).flatten(2)
        return self.out_proj(self.norm(y, z)), left

    def split_mixed(self, mixed_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The convolved channels [x | B | C] -> x_BTHV, B_BTNK, C_BTNK."""
        c = self.config
        x, B, C = mixed_BTC.split([self.inner_dim, self.group_dim, self.group_dim], dim=-1)
        by_group = (c.num_groups, c.state_dim)
        return x.unflatten(-1, (c.num_heads, c.head_dim)), B.unflatten(-1, by_group), C.unflatten(-1, by_group)
