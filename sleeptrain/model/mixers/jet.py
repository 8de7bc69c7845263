"""The JetBlock mixer of Jet-Nemotron (arXiv 2508.15884, section 2.3): Gated DeltaNet with a dynamic convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import JetConfig, ModelConfig
from sleeptrain.model.decay import KeepsDecayWide, decay_and_write
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.linear import products_of
from sleeptrain.model.mixers.gated_deltanet import delta_rule_kept_bytes, delta_rule_saved_bytes
from sleeptrain.model.mixers.spec import WIDE, Draw, MixerFlops, MixerSpec, Precision, uneven
from sleeptrain.model.norm import GatedRMSNorm
from sleeptrain.model.shards import Sharding
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import dynamic_causal_conv, gated_delta_rule


class Jet(KeepsDecayWide, nn.Module):
    """The recurrence of `GatedDeltaNet` with q = silu(W_q x) and k = silu(W_k x), without a convolution.

    The values pass through a convolution whose kernel depends on the features: kernel_t = W_2 silu(W_1 x_t) + bias, a
    tap for each channel and each of the last `conv_size` tokens. The rows of `kernel_out` are ordered by tap, the
    oldest token's first.
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
        inputs = (self.v_proj, self.kernel_in, self.q_proj, self.k_proj, self.in_proj_a, self.in_proj_b, self.in_proj_z)
        values, taps, q, k, a, b, *gate = products_of(x_BTD, inputs[:6] if state_only else inputs)
        v, new_tail = dynamic_causal_conv(
            values,
            self.kernel_out(F.silu(taps)).unflatten(-1, (c.conv_size, -1)),
            initial_state=tail if boundary.carry_conv else None,
            reset_BT=layout.reset_RL,
            valid_BT=layout.valid_RL,
        )
        o, S = gated_delta_rule(
            F.silu(q).unflatten(-1, (c.num_heads, c.head_k_dim)),
            F.silu(k).unflatten(-1, (c.num_heads, c.head_k_dim)),
            v.unflatten(-1, (c.num_heads, c.head_v_dim)),
            *decay_and_write(a, b, self.A_log, self.dt_bias, layout.valid_RL, rate=self.rate),
            initial_state=S,
            reset_BT=layout.reset_RL,
            segments=layout.segments,
            qk_l2norm=True,
        )
        new_state = Recurrent(S, new_tail if boundary.carry_conv else tail)
        if state_only:
            return None, new_state
        z = gate[0].unflatten(-1, (c.num_heads, c.head_v_dim))
        return self.out_proj(self.norm(o, z).flatten(2)), new_state


class JetSpec(MixerSpec):
    module = Jet
    settings_class = JetConfig
    state_layers = ("v_proj", "kernel_in", "kernel_out", "q_proj", "k_proj", "in_proj_a", "in_proj_b")
    feature_layers = ("in_proj_z", "out_proj")
    not_maps = ("in_proj_a.weight", "in_proj_b.weight")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        c = self.settings
        return (c.num_heads, c.head_k_dim, c.head_v_dim)

    @property
    def conv_pieces(self) -> tuple[int, ...]:
        return (self.settings.num_heads * self.settings.head_v_dim,)

    @property
    def conv_size(self) -> int:
        return self.settings.conv_size

    def initial_weight(self, name: str, draw: Draw) -> torch.Tensor | None:
        """The dynamic convolution begins as a static one: its weight is zero, its bias is drawn."""
        if name in ("A_log", "dt_bias"):
            return draw.decay()
        if name == "kernel_out.weight":
            return torch.zeros(draw.shape)
        if name == "kernel_out.bias":
            return draw.uniform(1 / math.sqrt(self.settings.conv_size))
        return super().initial_weight(name, draw)

    def sharding(self) -> dict[str, Sharding]:
        c, (values,) = self.settings, self.conv_pieces
        heads, keys = Sharding(0, (c.num_heads,)), Sharding(0, (c.num_heads * c.head_k_dim,))
        taps = Sharding(0, (values,) * c.conv_size)
        return {
            "q_proj.weight": keys,
            "k_proj.weight": keys,
            "v_proj.weight": Sharding(0, (values,)),
            "kernel_in.weight": Sharding(0, (c.kernel_dim,), gathered=True),
            "kernel_out.weight": taps,
            "kernel_out.bias": taps,
            "in_proj_b.weight": heads,
            "in_proj_a.weight": heads,
            "A_log": heads,
            "dt_bias": heads,
            "in_proj_z.weight": Sharding(0, (values,)),
            "norm.weight": Sharding(partial_gradient=True),
            "out_proj.weight": Sharding(1, (values,)),
        }

    def cut(self, size: int) -> JetConfig:
        return replace(self.settings, num_heads=self.settings.num_heads // size)

    def obstacles(self, size: int) -> Iterator[str]:
        c = self.settings
        yield from uneven("jet", {"num_heads": c.num_heads, "kernel_dim": c.kernel_dim}, size)

    @property
    def partial_gradients(self) -> int:
        return self.settings.head_v_dim

    def flops(self) -> MixerFlops:
        """The delta rule as in `GatedDeltaNetSpec.flops`, and the kernels of the convolution."""
        c, d, (values,), S = self.settings, self.model.dim, self.conv_pieces, math.prod(self.state_shape)
        kernels = 2 * c.kernel_dim * (d + c.conv_size * values)
        to_state = 2 * d * (2 * c.num_heads * c.head_k_dim + values + 2 * c.num_heads) + kernels + 4 * S
        return MixerFlops(to_state, 2 * S + 4 * d * values)

    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        c, (values,), narrow = self.settings, self.conv_pieces, precision.narrow
        # Queries, keys, the kernels' hidden layer and values, before and after SiLU (values are wide before); kernels.
        token = precision.inputs(self.model.dim, 6 if state_only else 7)
        token += narrow * (4 * c.num_heads * c.head_k_dim + 2 * c.kernel_dim)
        token += 2 * WIDE * values + narrow * (1 + c.conv_size) * values + 4 * WIDE * c.num_heads
        return token + delta_rule_saved_bytes(self.state_shape, c.num_heads, length, state_only, precision)

    def kept_bytes(self, state_only: bool, precision: Precision) -> int:
        return delta_rule_kept_bytes(self.state_shape, precision)
