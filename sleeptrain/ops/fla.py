"""The recurrences by flash-linear-attention's Triton kernels, for CUDA tensors.

The kernels read documents as sequences of one long row (`cu_seqlens`), with one state for each sequence: `Segments`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import torch

from sleeptrain.errors import ConfigError
from sleeptrain.ops.segments import Segments, cut_at_resets, segment_states

GATED_DELTA_RULE = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
GATED_LINEAR_ATTENTION = ("fla.ops.simple_gla", "chunk_simple_gla")
# Where the packages flash_qla or tilelang are installed, flash-linear-attention replaces kernels of its own by theirs
# without a word. These variables decide. None of the replacements has passed tests/kernels, so each is off unless its
# variable is set.
REPLACEMENTS = ("FLA_FLASH_QLA", "FLA_TILELANG")


def run_kernel(
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tensors: tuple[torch.Tensor, ...],
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    segments: Segments | None = None,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a kernel on [B, T, ...] tensors, with rows cut at their resets, if any. segments: the known cut."""
    state = None if initial_state is None else initial_state.float()
    if reset_BT is None:
        return kernel(*tensors, initial_state=state, output_final_state=True, **options)
    cut = segments or cut_at_resets(reset_BT)
    flat = (x.flatten(0, 1).unsqueeze(0) for x in tensors)
    o, S = kernel(
        *flat,
        initial_state=segment_states(state, cut),
        output_final_state=True,
        cu_seqlens=cut.cu_seqlens,
        cu_seqlens_cpu=cut.cu_seqlens_cpu,
        **options,
    )
    return o.unflatten(1, reset_BT.shape).squeeze(0), S[cut.last_of_row]


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTGV: torch.Tensor,
    g_BTG: torch.Tensor,
    beta_BTG: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    segments: Segments | None = None,
    qk_l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sleeptrain.ops.gated_delta_rule` on a GPU. Raises ConfigError if flash-linear-attention is missing."""
    tensors = (q_BTHK.to(v_BTGV.dtype), k_BTHK.to(v_BTGV.dtype), v_BTGV, g_BTG.float(), beta_BTG)
    kernel = _kernel(*GATED_DELTA_RULE)
    chunks = {} if segments is None else {"chunk_indices": segments.chunk_indices}
    return run_kernel(kernel, tensors, initial_state, reset_BT, segments, use_qk_l2norm_in_kernel=qk_l2norm, **chunks)


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    segments: Segments | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sleeptrain.ops.ssd` on a GPU, as gated linear attention without a scale. Raises ConfigError as above."""
    shared = x_BTHV.shape[2] // B_BTNK.shape[2]
    C_BTHK, B_BTHK = (x.to(x_BTHV.dtype).repeat_interleave(shared, dim=2) for x in (C_BTNK, B_BTNK))
    written = (x_BTHV * dt_BTH.unsqueeze(-1)).to(x_BTHV.dtype)
    g_BTH = dt_BTH.float() * A_H.float()
    kernel = _kernel(*GATED_LINEAR_ATTENTION)
    return run_kernel(kernel, (C_BTHK, B_BTHK, written, g_BTH), initial_state, reset_BT, segments, scale=1.0)


def load_kernels() -> None:
    """Raises ConfigError if flash-linear-attention cannot be loaded."""
    for kernel in (GATED_DELTA_RULE, GATED_LINEAR_ATTENTION):
        _kernel(*kernel)


def _kernel(module: str, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    for switch in REPLACEMENTS:
        os.environ.setdefault(switch, "0")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as missing:
        raise ConfigError(
            f"CUDA tensors need the Triton kernels of flash-linear-attention ({missing}): "
            "pip install 'sleeptrain[gpu]', or ask for implementation='chunked'"
        ) from missing
