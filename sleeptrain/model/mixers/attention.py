"""Softmax attention in a window: grouped queries and, as in Qwen3.5, q/k norms, partial RoPE and an output gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import AttentionConfig, ModelConfig
from sleeptrain.data.batch import PAD
from sleeptrain.model.document_layout import DocumentLayout, Place
from sleeptrain.model.linear import products_of
from sleeptrain.model.mixers.spec import WIDE, MixerFlops, MixerSpec, Precision, Rows, shareable, uneven
from sleeptrain.model.norm import HeadsRMSNorm, RMSNorm
from sleeptrain.model.rope import rope_tables, rotate, rotate_back
from sleeptrain.model.shards import Sharding
from sleeptrain.model.state import Boundary, LayerState, Recurrent, Retained, WindowKV
from sleeptrain.ops.document_attention import attend_in_documents, runs_kernel

_INPUTS = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """A token sees only its window (hard eviction) or the last `window` tokens (sliding eviction).

    With an output gate the rows of `q_proj` are [query | gate], head by head.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config.attention
        self.q_proj = nn.Linear(config.dim, c.num_heads * c.head_dim * (2 if c.gate else 1), bias=c.qkv_bias)
        self.k_proj = nn.Linear(config.dim, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(config.dim, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, config.dim, bias=False)
        self.q_norm = _head_norm(config, c.num_heads)
        self.k_norm = _head_norm(config, c.num_kv_heads)

    def forward(
        self,
        x_BTD: torch.Tensor,
        state: LayerState,
        layout: DocumentLayout,
        boundary: Boundary,
        state_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        """x_BTD -> (y_BTD, state). state: None under hard eviction; of a window in progress its keys and values."""
        sliding_window = boundary.sliding_window
        if layout.place is not None:
            return self._continue(x_BTD, state, layout, boundary)
        layers = (self.k_proj, self.v_proj) if state_only else (self.k_proj, self.v_proj, self.q_proj)
        keys, values, *queries = products_of(x_BTD, layers)
        k, v = self._keys_values(keys, values)
        retained = None if sliding_window is None else _retain(k, v, layout, sliding_window)
        if state_only:
            return None, retained
        q, gate = self._queries(queries[0])
        before = state if sliding_window is not None and isinstance(state, Retained) and layout.reads_retained else None
        if before is not None:
            k, v = torch.cat([before.k_BLGD, k], dim=1), torch.cat([before.v_BLGD, v], dim=1)
        # Positions count from the first token of the window; retained tokens have negative ones.
        num_queries, num_keys = q.shape[1], k.shape[1]
        tables = self._tables(num_queries - num_keys, num_keys, q)
        q = rotate(q, (tables[0][-num_queries:], tables[1][-num_queries:]))
        y = self._attend_window(q, rotate(k, tables), v, layout, before, sliding_window)
        return self._project(y, gate), retained

    @property
    def reads_bounds(self) -> bool:
        """True if it reads documents by their bounds (`DocumentLayout.bounds`), False if it needs a mask."""
        weight = next(self.q_proj.parameters())  # under ZeRO-3 to name the weight would gather it
        dtype = getattr(self.q_proj, "compute_dtype", None) or weight.dtype
        return runs_kernel(weight, dtype, self.config.head_dim)

    def _attend_window(
        self,
        q_RLHD: torch.Tensor,
        k_RKGD: torch.Tensor,
        v_RKGD: torch.Tensor,
        layout: DocumentLayout,
        before: Retained | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attention in a window. before: the retained tokens whose keys and values come first in k and v."""
        if layout.bounds is None:
            mask = layout.mask_RLL
            if before is not None and sliding_window is not None:
                mask = layout.with_retained(before.documents_BL, sliding_window)
            return self._attend(q_RLHD, k_RKGD, v_RKGD, mask)
        bounds, reach = layout.bounds, layout.reach
        if before is not None:
            bounds, reach = layout.bounds_after[before.k_BLGD.shape[1]], sliding_window
        if bounds.whole_rows and reach is None:  # torch chooses the fastest of its fused kernels
            return self._attend(q_RLHD, k_RKGD, v_RKGD, None)
        k, v = k_RKGD.to(q_RLHD.dtype), v_RKGD.to(q_RLHD.dtype)
        return attend_in_documents(q_RLHD, k, v, bounds, reach, self.config.scale or None)

    def _keys_values(self, keys_BTC: torch.Tensor, values_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys before rotation and values, [B, T, num_kv_heads, head_dim], from the projections."""
        shape = (*keys_BTC.shape[:2], self.config.num_kv_heads, self.config.head_dim)
        return self.k_norm(keys_BTC.view(shape)), values_BTC.view(shape)

    def _queries(self, queries_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries before rotation and gates, [B, T, num_heads, head_dim], from the projection."""
        q = queries_BTC.view(*queries_BTC.shape[:2], self.config.num_heads, -1)
        q, gate = q.chunk(2, dim=-1) if self.config.gate else (q, None)
        return self.q_norm(q), gate

    def _tables(self, first: int, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        return rope_tables(first, length, c.head_dim, c.partial_rotary_factor, c.rope_theta, like)

    def _project(self, y_BTHD: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        if gate is not None:
            y_BTHD = y_BTHD * torch.sigmoid(gate)
        return self.o_proj(y_BTHD.flatten(2))

    def _continue(
        self, x_BTD: torch.Tensor, state: LayerState, layout: DocumentLayout, boundary: Boundary
    ) -> tuple[torch.Tensor, WindowKV]:
        """The next tokens of windows in progress; adds their keys and values to the state."""
        place = layout.place
        assert place is not None and not isinstance(state, Retained | Recurrent)
        keys, values, queries = products_of(x_BTD, (self.k_proj, self.v_proj, self.q_proj))
        k, v = self._keys_values(keys, values)
        q, gate = self._queries(queries)
        tables = self._place_tables(place, x_BTD.shape[1], q)
        q, k = rotate(q, tables), rotate(k, tables)
        if state is None:
            slots = place.window * (1 if boundary.sliding_window is None else 2)
            shape = (k.shape[0], slots, *k.shape[2:])
            state = WindowKV(k.new_zeros(shape), v.new_zeros(shape))
        place.put(state.k_BCGD, k)
        place.put(state.v_BCGD, v)
        y = self._attend(q, place.seen(state.k_BCGD), place.seen(state.v_BCGD), layout.mask_RLL)
        return self._project(y, gate), state

    def _place_tables(self, place: Place, num_tokens: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if place.start is not None:
            return self._tables(place.start, num_tokens, like)
        cos, sin = self._tables(0, place.high, like)
        return cos[place.position_RL], sin[place.position_RL]

    def retained(self, full: WindowKV, rows_R: torch.Tensor) -> Retained:
        """The state that sliding eviction keeps of the full windows of these rows (int64 indices [R])."""
        window = full.k_BCGD.shape[1] // 2
        k, v = (t[:, window:].index_select(0, rows_R) for t in (full.k_BCGD, full.v_BCGD))
        documents = torch.zeros(k.shape[:2], dtype=torch.long, device=k.device)
        return Retained(rotate_back(k, self._tables(0, window, k)), v, documents)

    def put_before(self, kv: WindowKV, rows_R: torch.Tensor, retained: Retained) -> None:
        """Writes the previous window's keys and values into the slots before the next window's, in place."""
        window, num_retained = kv.k_BCGD.shape[1] // 2, retained.k_BLGD.shape[1]
        slots = slice(window - num_retained, window)
        kv.k_BCGD[rows_R, slots] = rotate(retained.k_BLGD, self._tables(-num_retained, num_retained, retained.k_BLGD))
        kv.v_BCGD[rows_R, slots] = retained.v_BLGD

    def _attend(
        self, q_BTHD: torch.Tensor, k_BCGD: torch.Tensor, v_BCGD: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention; without a mask it is causal if there are as many queries as keys, and else sees all keys."""
        q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BCGD.to(q_BTHD.dtype), v_BCGD.to(q_BTHD.dtype)))
        causal = False
        if mask is None and q.shape[2] == k.shape[2]:  # a branch: under torch.compile the comparison may be a symbol
            causal = True
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=self.config.scale or None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return y.transpose(1, 2)


class AttentionSpec(MixerSpec):
    module = Attention
    settings_class = AttentionConfig
    recurrent = False
    state_layers = ("k_proj", "v_proj")
    feature_layers = ("q_proj", "o_proj")

    @property
    def _widths(self) -> tuple[int, int]:
        """Channels of the queries, and of the keys (as many as of the values)."""
        c = self.settings
        return c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def carried_bytes(self, narrow: int, sliding_window: int, carry_conv: bool) -> int:
        """Keys, values, and the document of each token that sliding eviction keeps."""
        return self.reach(sliding_window) * (2 * narrow * self._widths[1] + 8)

    def fused_rows(self) -> Mapping[str, tuple[Rows, ...]]:
        c = self.settings
        if not c.gate:
            return {}
        rows = torch.arange(c.num_heads * c.head_dim * 2).view(c.num_heads, 2, c.head_dim)
        return {"q_proj.weight": (rows[:, 0].flatten(), rows[:, 1].flatten())}

    def sharding(self) -> dict[str, Sharding]:
        c, (query, keys) = self.settings, self._widths
        shared = Sharding(0, (keys,), heads=(c.num_kv_heads, c.head_dim))
        rules = {
            # The rows are [query | gate], head by head: equal consecutive parts are whole heads with their gates.
            "q_proj.weight": Sharding(0, (query * (2 if c.gate else 1),)),
            "k_proj.weight": shared,
            "v_proj.weight": shared,
            "o_proj.weight": Sharding(1, (query,)),
        }
        if c.qkv_bias:
            rules |= {f"{name}.bias": replace(rules[f"{name}.weight"], heads=None) for name in _INPUTS}
        if c.qk_norm == "all":  # `obstacles` refuses to cut it over ranks
            return rules | {"q_norm.weight": Sharding(), "k_norm.weight": Sharding()}
        norms = ("q_norm.weight", "k_norm.weight") if c.qk_norm == "head" else ()
        return rules | {name: Sharding(partial_gradient=True) for name in norms}

    def cut(self, size: int) -> AttentionConfig:
        c = self.settings
        return replace(c, num_heads=c.num_heads // size, num_kv_heads=max(c.num_kv_heads // size, 1))

    def obstacles(self, size: int) -> Iterator[str]:
        """There may be fewer key-value heads than ranks: several ranks then share a head."""
        c = self.settings
        yield from uneven("attention", {"num_heads": c.num_heads}, size)
        if size > 1:
            if c.qk_norm == "all":
                yield "model.attention.qk_norm (all)"
            if c.post_norm:
                yield "model.attention.post_norm (true)"
        if not shareable(c.num_kv_heads, c.head_dim, size):
            yield f"model.attention.num_kv_heads ({c.num_kv_heads}) of head_dim {c.head_dim}"

    @property
    def partial_gradients(self) -> int:
        return 2 * self.settings.head_dim * (self.settings.qk_norm == "head")

    def flops(self) -> MixerFlops:
        d, (query, keys) = self.model.dim, self._widths
        return MixerFlops(4 * d * keys, 2 * d * query * (3 if self.settings.gate else 2), 4 * query)

    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        c, d, narrow, (query, keys) = self.settings, self.model.dim, precision.narrow, self._widths
        if state_only:
            return precision.inputs(d, 2) + (precision.normed(narrow) * keys if c.qk_norm != "none" else 0)
        # Rotated queries and keys, values, the output of attention and its logarithms of sums. Its heads are joined
        # without a copy.
        token = precision.inputs(d, 3) + narrow * (2 * query + 2 * keys) + WIDE * c.num_heads
        if c.gate:  # after the sigmoid, and the gated output
            token += narrow * 2 * query
        if c.qk_norm != "none":  # the inputs of the norms; PyTorch's in fp32 shares a tensor with the gate
            shared = query if c.gate and narrow == WIDE and not precision.kernels else 0
            token += precision.normed(narrow) * (query + keys + shared) + WIDE * (c.num_heads + c.num_kv_heads)
        return token

    def kept_bytes(self, state_only: bool, precision: Precision) -> int:
        """The output of attention, and the logarithm of each query's sum of exponentials."""
        return 0 if state_only else precision.narrow * self._widths[0] + WIDE * self.settings.num_heads


def _head_norm(config: ModelConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys, [..., num_heads, head_dim]."""
    c = config.attention
    if c.qk_norm == "all":
        return HeadsRMSNorm(num_heads * c.head_dim, config.norm_eps, config.norm)
    return RMSNorm(c.head_dim, config.norm_eps, config.norm) if c.qk_norm == "head" else nn.Identity()


def _retain(k: torch.Tensor, v: torch.Tensor, layout: DocumentLayout, window: int) -> Retained:
    """The last `window` tokens. Shorter windows are padded in front: the cache of every row has the same shape."""
    documents = layout.documents_RL
    missing = window - k.shape[1]
    if missing > 0:
        k, v = (F.pad(t, (0, 0, 0, 0, missing, 0)) for t in (k, v))
        documents = F.pad(documents, (missing, 0), value=PAD)
    return Retained(k[:, -window:], v[:, -window:], documents[:, -window:])
