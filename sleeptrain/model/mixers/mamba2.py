"""The Mamba-2 mixer (state-space duality, arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import Mamba2Config, ModelConfig
from sleeptrain.model.decay import KeepsDecayWide
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.mixers.spec import (
    WIDE,
    Draw,
    MixerFlops,
    MixerSpec,
    Precision,
    Rows,
    consecutive_rows,
    shareable,
    uneven,
)
from sleeptrain.model.norm import GatedRMSNorm
from sleeptrain.model.shards import Sharding, TensorRank, own_heads
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import causal_conv, ssd
from sleeptrain.ops.chunks import Cut
from sleeptrain.ops.ssd import CHUNK


class Mamba2(KeepsDecayWide, nn.Module):
    """S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t + D x_t; dt = softplus(W_dt x + dt_bias), A < 0.

    The rows of `in_proj` are [z | x | B | C | dt]; x, B and C pass through a short causal convolution with SiLU. S is
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
        self,
        x_BTD: torch.Tensor,
        state: LayerState,
        layout: DocumentLayout,
        boundary: Boundary,
        state_only: bool = False,
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
            segments=layout.segments,
            needs_tail=boundary.carry_conv,
        )
        x_BTHV, B_BTNK, C_BTNK = self.split_mixed(mixed)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if layout.valid_RL is not None:
            dt = torch.where(layout.valid_RL.unsqueeze(-1), dt, 0.0)
        y, S = ssd(
            C_BTNK,
            B_BTNK,
            x_BTHV,
            dt,
            -self.A_log.to(wide).exp(),
            initial_state=S,
            reset_BT=layout.reset_RL,
            segments=layout.segments,
        )
        new_state = Recurrent(S, new_tail if boundary.carry_conv else tail)
        if state_only:
            return None, new_state
        y = (y + self.D.to(y.dtype).unsqueeze(-1) * x_BTHV).flatten(2)
        return self.out_proj(self.norm(y, z)), new_state

    def split_mixed(self, mixed_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The convolved channels [x | B | C] -> x_BTHV, B_BTNK, C_BTNK."""
        c = self.config
        x, B, C = mixed_BTC.split([self.inner_dim, self.group_dim, self.group_dim], dim=-1)
        by_group = (c.num_groups, c.state_dim)
        return x.unflatten(-1, (c.num_heads, c.head_dim)), B.unflatten(-1, by_group), C.unflatten(-1, by_group)


class SharedGroupMamba2(Mamba2):
    """One tensor rank of Mamba-2 with fewer groups than ranks: it stores an equal part of all groups' B and C channels.

    It convolves its part, then the ranks gather the parts; this rank's heads read one group. local: the settings of the
    rank, with one group. num_groups: of the whole mixer.
    """

    def __init__(self, local: ModelConfig, num_groups: int, place: TensorRank):
        super().__init__(local)
        c = self.config
        self._num_groups, self._place = num_groups, place
        self._local_channels = num_groups * c.state_dim // place.size
        self.conv_dim = self.inner_dim + 2 * self._local_channels
        self.in_proj = nn.Linear(local.dim, self.inner_dim + self.conv_dim + c.num_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, c.conv_size))
        self.conv_bias = nn.Parameter(torch.zeros(self.conv_dim))

    def split_mixed(self, mixed_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        c, place = self.config, self._place
        x, B_C = mixed_BTC.split([self.inner_dim, 2 * self._local_channels], dim=-1)
        # By rank [B part | C part] -> [B of all groups | C of all groups].
        gathered = place.gather(B_C).unflatten(-1, (place.size, 2, self._local_channels)).transpose(-3, -2).flatten(-2)
        group = own_heads(self._num_groups, place.rank, place.size).start
        B, C = gathered.narrow(-1, group * c.state_dim, c.state_dim).unbind(-2)
        return x.unflatten(-1, (c.num_heads, c.head_dim)), B.unsqueeze(-2), C.unsqueeze(-2)


class Mamba2Spec(MixerSpec):
    module = Mamba2
    settings_class = Mamba2Config
    state_layers = ("in_proj",)
    feature_layers = ("out_proj",)
    not_matrices = ("conv_weight",)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        c = self.settings
        return (c.num_heads, c.state_dim, c.head_dim)

    @property
    def conv_pieces(self) -> tuple[int, ...]:
        """[x | B | C]."""
        c = self.settings
        groups = c.num_groups * c.state_dim
        return (c.num_heads * c.head_dim, groups, groups)

    @property
    def conv_size(self) -> int:
        return self.settings.conv_size

    @property
    def _in_pieces(self) -> tuple[int, ...]:
        """[z | x | B | C | dt]."""
        return (self.conv_pieces[0], *self.conv_pieces, self.settings.num_heads)

    def initial_weight(self, name: str, draw: Draw) -> torch.Tensor | None:
        if name in ("A_log", "dt_bias"):
            return draw.decay()
        if name == "conv_weight":
            return draw.uniform(1 / math.sqrt(draw.shape[-1]))
        return None if name in ("D", "conv_bias") else super().initial_weight(name, draw)

    def fused_rows(self) -> Mapping[str, tuple[Rows, ...]]:
        return {"in_proj.weight": consecutive_rows(*self._in_pieces)}

    def sharding(self) -> dict[str, Sharding]:
        inner, channels = self.conv_pieces[:1], Sharding(0, self.conv_pieces)
        heads = Sharding(0, (self.settings.num_heads,))
        return {
            "in_proj.weight": Sharding(0, self._in_pieces),
            "conv_weight": channels,
            "conv_bias": channels,
            "A_log": heads,
            "dt_bias": heads,
            "D": heads,
            "norm.weight": Sharding(0, inner),
            "out_proj.weight": Sharding(1, inner),
        }

    def cut(self, size: int) -> Mamba2Config:
        c = self.settings
        return replace(c, num_heads=c.num_heads // size, num_groups=max(c.num_groups // size, 1))

    def obstacles(self, size: int) -> Iterator[str]:
        """There may be fewer groups than ranks: several ranks then share a group."""
        c = self.settings
        yield from uneven("mamba2", {"num_heads": c.num_heads}, size)
        if not shareable(c.num_groups, c.state_dim, size):
            yield f"model.mamba2.num_groups ({c.num_groups}) of state_dim {c.state_dim}"

    def rank_module(self, local: ModelConfig, place: TensorRank) -> nn.Module | None:
        num_groups = self.settings.num_groups
        return SharedGroupMamba2(local, num_groups, place) if num_groups % place.size else None

    def exchanged(self, size: int) -> int:
        """B and C of all groups, if ranks share groups."""
        return sum(self.conv_pieces[1:]) if self.settings.num_groups % size else 0

    @property
    def summed_squares(self) -> int:
        return 1

    def flops(self) -> MixerFlops:
        """Per token and head SSD costs 4 K V."""
        d, inner, S = self.model.dim, self.conv_pieces[0], math.prod(self.state_shape)
        return MixerFlops(2 * d * sum(self._in_pieces) + 2 * S, 2 * S + 2 * d * inner)

    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        c, narrow = self.settings, precision.narrow
        inner, groups, _ = self.conv_pieces
        conv = sum(self.conv_pieces)
        projected = inner + conv + c.num_heads
        token = precision.inputs(self.model.dim, 1) + narrow * conv + 2 * WIDE * c.num_heads
        if precision.kernels:
            # The projection, of which the convolution reads a slice; of each head B, C, and x times dt.
            token += narrow * (projected + 2 * c.num_heads * c.state_dim + inner) + WIDE * c.num_heads
        else:
            size = Cut.of(length, CHUNK, 1).size
            matrices = c.num_heads * (2 * size + c.state_dim * c.head_dim // size)
            token += WIDE * (2 * conv + 2 * groups + 2 * inner + matrices)
        if not state_only:
            gate = inner  # a wide copy; in fp32 the projection, which kernels save already
            if narrow == WIDE:
                gate = 0 if precision.kernels else projected
            token += WIDE * (gate + 3 * inner + 1) + narrow * inner
        return token

    def kept_bytes(self, state_only: bool, precision: Precision) -> int:
        """The results of a kernel's recurrence, without the state; PyTorch's recurrence runs again."""
        return precision.narrow * self.conv_pieces[0] + WIDE * self.settings.num_heads if precision.kernels else 0
