"""The states at the borders of chunks, by flash-linear-attention's kernels of gated linear attention.

Where a row is several sequences, the package's own functions for them (`chunk_fwd_h`, `chunk_bwd_dh`) read the number
of chunks back from the device: the host then waits for all work before. The caller knows that number, so the kernels
are launched here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sleeptrain.ops.fla_package import from_fla
from sleeptrain.ops.segments import CHUNK

STATES, UTILS = "fla.ops.common.chunk_h", "fla.ops.utils"


def forward_states(
    k: torch.Tensor,
    v: torch.Tensor,
    g_sum: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    final: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the state before each chunk [B, chunks, H, K, V] in `dtype`, the final states [N, H, K, V] fp32 if `final`).

    k: [B, T, H, K], v: [B, T, H, V]; the other arguments are those of `fla_linear_attention.gated_linear_attention`.
    """
    (batch, num_tokens, heads, key_dim), value_dim = k.shape, v.shape[3]
    sequences, chunks = _counts(k, cu_seqlens, chunk_indices)
    h = k.new_empty(batch, chunks, heads, key_dim, value_dim, dtype=dtype)
    last = k.new_empty(sequences, heads, key_dim, value_dim, dtype=torch.float32) if final else None
    from_fla(STATES, "chunk_fwd_kernel_h")[_grid(key_dim, value_dim, sequences * heads)](
        k=k, v=v, h=h, g=g_sum, g_gamma=None, gk=None, gv=None, h0=initial_state, ht=last,
        cu_seqlens=cu_seqlens, split_offsets=_offsets(cu_seqlens), T=num_tokens, H=heads, K=key_dim, V=value_dim,
        BT=CHUNK, BS=CHUNK, **_GATES,
    )  # fmt: skip
    return h, last


def backward_states(
    q: torch.Tensor,
    do: torch.Tensor,
    g_sum: torch.Tensor,
    initial_state: torch.Tensor | None,
    dS: torch.Tensor | None,
    scale: float,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the gradient of the state after each chunk [B, chunks, H, K, V] fp32, that of the initial states, if any, fp32).

    q: [B, T, H, K], do: [B, T, H, V]; dS: the gradient of the final states, None for zeros.
    """
    (batch, num_tokens, heads, key_dim), value_dim = q.shape, do.shape[3]
    sequences, chunks = _counts(q, cu_seqlens, chunk_indices)
    dh = q.new_empty(batch, chunks, heads, key_dim, value_dim, dtype=torch.float32)
    first = None if initial_state is None else torch.empty_like(initial_state, dtype=torch.float32)
    from_fla(STATES, "chunk_bwd_kernel_dh")[_grid(key_dim, value_dim, sequences * heads)](
        q=q, g=g_sum, g_gamma=None, gk=None, gv=None, do=do, dh=dh, dht=dS, dh0=first,
        cu_seqlens=cu_seqlens, split_offsets=_offsets(cu_seqlens), scale=scale, T=num_tokens, HQ=heads, H=heads,
        K=key_dim, V=value_dim, BT=CHUNK, BS=CHUNK, NG=1, **_GATES,
    )  # fmt: skip
    return dh, first


# Decays are one number a head and token; states are [K, V].
_GATES = {"USE_G": True, "USE_G_GAMMA": False, "USE_GK": False, "USE_GV": False, "STATE_V_FIRST": False}


def _counts(k: torch.Tensor, cu_seqlens: torch.Tensor | None, chunk_indices: torch.Tensor | None) -> tuple[int, int]:
    """(sequences, chunks of a row), from shapes alone."""
    if cu_seqlens is None or chunk_indices is None:
        return k.shape[0], -(-k.shape[1] // CHUNK)
    return cu_seqlens.shape[0] - 1, chunk_indices.shape[0]


def _offsets(cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    """The first chunk of each sequence, computed on the device."""
    return None if cu_seqlens is None else from_fla(UTILS, "prepare_chunk_offsets")(cu_seqlens, CHUNK)


def _grid(key_dim: int, value_dim: int, heads: int) -> Callable[[dict[str, int]], tuple[int]]:
    """The kernel's programs: blocks of a state, times the states."""

    def programs(blocks: dict[str, int]) -> tuple[int]:
        return (-(-key_dim // blocks["BK"]) * -(-value_dim // blocks["BV"]) * heads,)

    return programs
