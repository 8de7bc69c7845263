"""The Gated DeltaNet mixer (arXiv 2412.06464) as in Qwen3.5: fused short convolution, delta rule, gated norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from sleeptrain.config.schema import GatedDeltaNetConfig, ModelConfig
from sleeptrain.model.decay import KeepsDecayWide, decay_and_write
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.linear import products_of
from sleeptrain.model.mixers.spec import WIDE, Draw, MixerFlops, MixerSpec, Precision, Rows, consecutive_rows, uneven
from sleeptrain.model.norm import GatedRMSNorm
from sleeptrain.model.shards import Sharding
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import causal_conv, gated_delta_rule
from sleeptrain.ops.chunks import Cut
from sleeptrain.ops.gated_delta_rule import chunk_size

FLA_CHUNK = 64  # tokens of a chunk in flash-linear-attention, which saves a [C, C] inverse for each chunk


class GatedDeltaNet(KeepsDecayWide, nn.Module):
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K).

    b = sigmoid(W_b x), or 2 sigmoid(W_b x) with `allow_neg_eigval` (arXiv 2411.12537);
    log a = -exp(A_log) softplus(W_a x + dt_bias). q, k and v pass through a short causal convolution with SiLU; q and k
    have unit length. The rows of `in_proj_qkv` are [q | k | v]. Key head i serves the value heads
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
        inputs = (self.in_proj_qkv, self.in_proj_a, self.in_proj_b, self.in_proj_z)
        qkv, a, b, *gate = products_of(x_BTD, inputs[:3] if state_only else inputs)
        mixed, new_tail = causal_conv(
            qkv,
            self.conv_weight,
            initial_state=tail if boundary.carry_conv else None,
            reset_BT=layout.reset_RL,
            valid_BT=layout.valid_RL,
            segments=layout.segments,
            needs_tail=boundary.carry_conv,
        )
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        o, S = gated_delta_rule(
            q.unflatten(-1, (c.num_k_heads, c.head_k_dim)),
            k.unflatten(-1, (c.num_k_heads, c.head_k_dim)),
            v.unflatten(-1, (c.num_v_heads, c.head_v_dim)),
            *decay_and_write(a, b, self.A_log, self.dt_bias, layout.valid_RL, self.strongest, self.rate),
            initial_state=S,
            reset_BT=layout.reset_RL,
            segments=layout.segments,
            qk_l2norm=True,
        )
        new_state = Recurrent(S, new_tail if boundary.carry_conv else tail)
        if state_only:
            return None, new_state
        z = gate[0].unflatten(-1, (c.num_v_heads, c.head_v_dim))
        return self.out_proj(self.norm(o, z).flatten(2)), new_state


class GatedDeltaNetSpec(MixerSpec):
    module = GatedDeltaNet
    settings_class = GatedDeltaNetConfig
    state_layers = ("in_proj_qkv", "in_proj_a", "in_proj_b")
    feature_layers = ("in_proj_z", "out_proj")
    not_maps = ("in_proj_a.weight", "in_proj_b.weight")
    not_matrices = ("conv_weight",)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        c = self.settings
        return (c.num_v_heads, c.head_k_dim, c.head_v_dim)

    @property
    def conv_pieces(self) -> tuple[int, ...]:
        """[q | k | v]."""
        c = self.settings
        keys = c.num_k_heads * c.head_k_dim
        return (keys, keys, c.num_v_heads * c.head_v_dim)

    @property
    def conv_size(self) -> int:
        return self.settings.conv_size

    def initial_weight(self, name: str, draw: Draw) -> torch.Tensor | None:
        if name in ("A_log", "dt_bias"):
            return draw.decay()
        if name == "conv_weight":
            return draw.uniform(1 / math.sqrt(draw.shape[-1]))
        return super().initial_weight(name, draw)

    def fused_rows(self) -> Mapping[str, tuple[Rows, ...]]:
        return {"in_proj_qkv.weight": consecutive_rows(*self.conv_pieces)}

    def sharding(self) -> dict[str, Sharding]:
        qkv, heads = self.conv_pieces, Sharding(0, (self.settings.num_v_heads,))
        return {
            "in_proj_qkv.weight": Sharding(0, qkv),
            "in_proj_z.weight": Sharding(0, qkv[2:]),
            "in_proj_b.weight": heads,
            "in_proj_a.weight": heads,
            "conv_weight": Sharding(0, qkv),
            "A_log": heads,
            "dt_bias": heads,
            "norm.weight": Sharding(partial_gradient=True),
            "out_proj.weight": Sharding(1, qkv[2:]),
        }

    def cut(self, size: int) -> GatedDeltaNetConfig:
        c = self.settings
        return replace(c, num_k_heads=c.num_k_heads // size, num_v_heads=c.num_v_heads // size)

    def obstacles(self, size: int) -> Iterator[str]:
        c = self.settings
        yield from uneven("gated_deltanet", {"num_k_heads": c.num_k_heads, "num_v_heads": c.num_v_heads}, size)

    @property
    def partial_gradients(self) -> int:
        return self.settings.head_v_dim

    def flops(self) -> MixerFlops:
        """Per token and head the delta rule costs 6 K V: read S^T k, write k v^T, read S^T q."""
        d, (keys, _, values), S = self.model.dim, self.conv_pieces, math.prod(self.state_shape)
        return MixerFlops(2 * d * (2 * keys + values + 2 * self.settings.num_v_heads) + 4 * S, 2 * S + 4 * d * values)

    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        c, conv, conv_saved = self.settings, sum(self.conv_pieces), conv_saved_bytes(precision)
        # The convolution, then q, k and v; the intermediate values of both gates.
        token = precision.inputs(self.model.dim, 3 if state_only else 4) + (conv_saved + precision.narrow) * conv
        token += 4 * WIDE * c.num_v_heads
        return token + delta_rule_saved_bytes(self.state_shape, c.num_k_heads, length, state_only, precision)

    def kept_bytes(self, state_only: bool, precision: Precision) -> int:
        return delta_rule_kept_bytes(self.state_shape, precision)


def conv_saved_bytes(precision: Precision) -> int:
    """Bytes per token and channel that autograd saves for a short convolution, without what reads its output.

    A kernel saves its input; PyTorch a wide copy of it, and the output before SiLU.
    """
    return precision.narrow if precision.kernels else 2 * WIDE


def delta_rule_kept_bytes(state_shape: tuple[int, int, int], precision: Precision) -> int:
    """Bytes per token of the results of a kernel's recurrence, without the state; PyTorch's recurrence runs again."""
    heads, _, V = state_shape
    return heads * (precision.narrow * (V + FLA_CHUNK) + WIDE) if precision.kernels else 0


def delta_rule_saved_bytes(
    state_shape: tuple[int, int, int], key_heads: int, length: int, state_only: bool, precision: Precision
) -> int:
    """Bytes per token that autograd saves for the recurrence and its gated norm."""
    heads, K, V = state_shape
    if precision.kernels:
        token = heads * (precision.narrow * FLA_CHUNK + WIDE) + 2 * WIDE * key_heads
    else:
        size = Cut.of(length, chunk_size(K), 1).size
        token = WIDE * heads * (3 * K + V + 2 + 4 * size + K * V // size)
    if not state_only:  # norm, gate, and their product, which the projection reads
        gated = 2 * precision.narrow if precision.kernels else 4 * WIDE
        token += (gated + precision.narrow) * heads * V + WIDE * heads
    return token
