"""Softmax attention inside a window: grouped queries and, as in Qwen3.5, q/k norms, partial RoPE, an output gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.data.batch import PAD
from sleeptrain.model.layout import Layout
from sleeptrain.model.norm import HeadsRMSNorm, RMSNorm
from sleeptrain.model.rope import rope_tables, rotate
from sleeptrain.model.state import Boundary, LayerState, Retained


class Attention(nn.Module):
    """Attention never looks past its window (hard eviction), or past the last `window` tokens (sliding eviction).

    The rows of `q_proj` are, head by head, [query | gate] when the output is gated.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.attention
        self.q_proj = nn.Linear(config.dim, c.num_heads * c.head_dim * (2 if c.gate else 1), bias=False)
        self.k_proj = nn.Linear(config.dim, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, config.dim, bias=False)
        self.q_norm = _head_norm(config, c.num_heads)
        self.k_norm = _head_norm(config, c.num_kv_heads)

    def forward(
        self, x_BTD: torch.Tensor, state: LayerState, layout: Layout, boundary: Boundary, state_only: bool = False
    ) -> tuple[torch.Tensor | None, LayerState]:
        """x_BTD -> (y_BTD, state). Hard eviction leaves no state."""
        c, sliding_window = self.config, boundary.sliding_window
        kv_shape = (*x_BTD.shape[:2], c.num_kv_heads, c.head_dim)
        k = self.k_norm(self.k_proj(x_BTD).view(kv_shape))
        v = self.v_proj(x_BTD).view(kv_shape)
        left = None if sliding_window is None else _retain(k, v, layout, sliding_window)
        if state_only:
            return None, left
        q = self.q_proj(x_BTD).view(*x_BTD.shape[:2], c.num_heads, -1)
        gate = None
        if c.gate:
            q, gate = q.chunk(2, dim=-1)
        mask = layout.mask_RLL
        if sliding_window is not None and isinstance(state, Retained):
            mask = layout.with_retained(state.documents_BL, sliding_window)
            k, v = torch.cat([state.k_BLGD, k], dim=1), torch.cat([state.v_BLGD, v], dim=1)
        y = self._attend(self.q_norm(q), k, v, mask)
        if gate is not None:
            y = y * torch.sigmoid(gate)
        return self.o_proj(y.flatten(2)), left

    def _attend(
        self, q_BTHD: torch.Tensor, k_BCGD: torch.Tensor, v_BCGD: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Positions count from the first token of the window; what was retained lies before it."""
        c = self.config
        num_queries, num_keys = q_BTHD.shape[1], k_BCGD.shape[1]
        first = num_queries - num_keys
        tables = rope_tables(first, num_keys, c.head_dim, c.partial_rotary_factor, c.rope_theta, q_BTHD)
        q = rotate(q_BTHD, (tables[0][-num_queries:], tables[1][-num_queries:]))
        k = rotate(k_BCGD, tables).to(q.dtype)
        v = v_BCGD.to(q.dtype)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=c.scale or None,
            enable_gqa=c.num_heads != c.num_kv_heads,
        )
        return y.transpose(1, 2)


def _head_norm(config: ModelConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys, [..., num_heads, head_dim]."""
    c = config.attention
    if c.qk_norm == "all":
        return HeadsRMSNorm(num_heads * c.head_dim, config.norm_eps, config.norm)
    return RMSNorm(c.head_dim, config.norm_eps, config.norm) if c.qk_norm == "head" else nn.Identity()


def _retain(k: torch.Tensor, v: torch.Tensor, layout: Layout, window: int) -> Retained:
    """The last `window` tokens; shorter windows are padded in front so that every row's cache has one shape."""
    documents = layout.documents_RL
    missing = window - k.shape[1]
    if missing > 0:
        k, v = (F.pad(t, (0, 0, 0, 0, missing, 0)) for t in (k, v))
        documents = F.pad(documents, (missing, 0), value=PAD)
    return Retained(k[:, -window:], v[:, -window:], documents[:, -window:])
