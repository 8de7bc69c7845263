"""Plain linear attention, a mixer as another package would bring it: its module, its settings and its spec."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from sleeptrain.config.mixers import mixer_settings
from sleeptrain.config.schema import ModelConfig
from sleeptrain.config.setting import setting
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.mixers.spec import WIDE, MixerFlops, MixerSpec, Precision, uneven
from sleeptrain.model.shards import Sharding
from sleeptrain.model.state import Boundary, LayerState, Recurrent
from sleeptrain.ops import ssd
from sleeptrain.ops.chunks import Cut
from sleeptrain.ops.ssd import CHUNK

NAME = "linear_attention"


@dataclass
class LinearAttentionConfig:
    """S is [num_heads, head_k_dim, head_v_dim] for each row."""

    num_heads: int = setting(2, "heads", at_least=1)
    head_k_dim: int = setting(8, "width of keys", at_least=1)
    head_v_dim: int = setting(8, "width of values", at_least=1)


class LinearAttention(nn.Module):
    """S_t = S_{t-1} + k_t v_t^T, y_t = S_t^T q_t: the recurrence of Mamba-2 without decay."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = mixer_settings(config, NAME)
        keys, values = c.num_heads * c.head_k_dim, c.num_heads * c.head_v_dim
        self.q_proj = nn.Linear(config.dim, keys, bias=False)
        self.k_proj = nn.Linear(config.dim, keys, bias=False)
        self.v_proj = nn.Linear(config.dim, values, bias=False)
        self.out_proj = nn.Linear(values, config.dim, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        state: LayerState,
        layout: DocumentLayout,
        boundary: Boundary,
        state_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        c = self.config
        S = state.S_BHKV if isinstance(state, Recurrent) else None
        q, k = (p(x_BTD).unflatten(-1, (c.num_heads, c.head_k_dim)) for p in (self.q_proj, self.k_proj))
        writes = torch.ones(*x_BTD.shape[:2], c.num_heads, dtype=torch.promote_types(x_BTD.dtype, torch.float32))
        if layout.valid_RL is not None:
            writes = writes.masked_fill(~layout.valid_RL.unsqueeze(-1), 0.0)
        y, S = ssd(
            q,
            k,
            self.v_proj(x_BTD).unflatten(-1, (c.num_heads, c.head_v_dim)),
            writes,
            writes.new_zeros(c.num_heads),
            initial_state=S,
            reset_BT=layout.reset_RL,
        )
        return (None if state_only else self.out_proj(y.flatten(2))), Recurrent(S)


class LinearAttentionSpec(MixerSpec):
    module = LinearAttention
    settings_class = LinearAttentionConfig
    state_layers = ("q_proj", "k_proj", "v_proj")
    feature_layers = ("out_proj",)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        c = self.settings
        return (c.num_heads, c.head_k_dim, c.head_v_dim)

    def sharding(self) -> dict[str, Sharding]:
        c = self.settings
        keys, values = c.num_heads * c.head_k_dim, c.num_heads * c.head_v_dim
        return {
            "q_proj.weight": Sharding(0, (keys,)),
            "k_proj.weight": Sharding(0, (keys,)),
            "v_proj.weight": Sharding(0, (values,)),
            "out_proj.weight": Sharding(1, (values,)),
        }

    def cut(self, size: int) -> LinearAttentionConfig:
        return replace(self.settings, num_heads=self.settings.num_heads // size)

    def obstacles(self, size: int) -> Iterator[str]:
        yield from uneven(f"mixers.{NAME}", {"num_heads": self.settings.num_heads}, size)

    def flops(self) -> MixerFlops:
        c, d, S = self.settings, self.model.dim, math.prod(self.state_shape)
        keys, values = c.num_heads * c.head_k_dim, c.num_heads * c.head_v_dim
        return MixerFlops(2 * d * (keys + values) + 2 * S, 2 * d * (keys + values) + 2 * S)

    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        c, dim = self.settings, self.model.dim
        keys, values = c.num_heads * c.head_k_dim, c.num_heads * c.head_v_dim
        size = Cut.of(length, CHUNK, 1).size
        kept = 2 * keys + 2 * values + c.num_heads * (2 * size + 2 + c.head_k_dim * c.head_v_dim // size)
        return precision.inputs(dim, 3) + WIDE * (kept + (0 if state_only else values))
