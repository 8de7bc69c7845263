"""The recurrences by flash-linear-attention's Triton kernels, for CUDA tensors.

The kernels read documents as sequences of one long row (`cu_seqlens`), with one state for each sequence. So resets cut
rows into segments, which are laid end to end. The first segment of a row begins with the row's state, unless the row
begins with a reset; all other segments begin with zeros. The final state of a row's last segment is the row's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from sleeptrain.errors import ConfigError

GATED_DELTA_RULE = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
GATED_LINEAR_ATTENTION = ("fla.ops.simple_gla", "chunk_simple_gla")
# Where the packages flash_qla or tilelang are installed, flash-linear-attention replaces kernels of its own by theirs
# without a word. These variables decide. None of the replacements has passed tests/kernels, so each is off unless its
# variable is set.
REPLACEMENTS = ("FLA_FLASH_QLA", "FLA_TILELANG")


class Segments(NamedTuple):
    """The segments of B rows of T tokens, cut at resets, in the order of the flattened rows."""

    cu_seqlens: torch.Tensor  # int64 [segments + 1], boundaries in the flattened [B * T]
    row: torch.Tensor  # int64 [segments], the row of each segment
    continues: torch.Tensor  # bool [segments], the segment begins with the row's initial state
    last_of_row: torch.Tensor  # int64 [B], the last segment of each row


def segments(reset_BT: torch.Tensor) -> Segments:
    """Cut rows at their resets; the start of a row is a boundary too."""
    batch, num_tokens = reset_BT.shape
    begins = reset_BT.bool().clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * num_tokens])])
    continues = ~reset_BT.bool().flatten()[starts]
    return Segments(cu_seqlens, starts // num_tokens, continues, begins.sum(1).cumsum(0) - 1)


def segment_states(initial_state: torch.Tensor | None, cut: Segments) -> torch.Tensor | None:
    """[B, ...] -> [segments, ...]: the row's state for segments that continue it, zeros for the others."""
    if initial_state is None:
        return None
    continues = cut.continues.view(-1, *[1] * (initial_state.dim() - 1))
    return initial_state[cut.row].masked_fill(~continues, 0.0)


def run_kernel(
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    tensors: tuple[torch.Tensor, ...],
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a kernel on [B, T, ...] tensors, with rows cut at their resets, if any."""
    state = None if initial_state is None else initial_state.float()
    if reset_BT is None:
        return kernel(*tensors, initial_state=state, output_final_state=True, **options)
    cut = segments(reset_BT)
    flat = (x.flatten(0, 1).unsqueeze(0) for x in tensors)
    o, S = kernel(
        *flat, initial_state=segment_states(state, cut), output_final_state=True, cu_seqlens=cut.cu_seqlens, **options
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
    qk_l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sleeptrain.ops.gated_delta_rule` on a GPU. Raises ConfigError if flash-linear-attention is missing."""
    tensors = (q_BTHK.to(v_BTGV.dtype), k_BTHK.to(v_BTGV.dtype), v_BTGV, g_BTG.float(), beta_BTG)
    kernel = _kernel(*GATED_DELTA_RULE)
    return run_kernel(kernel, tensors, initial_state, reset_BT, use_qk_l2norm_in_kernel=qk_l2norm)


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sleeptrain.ops.ssd` on a GPU, as gated linear attention without a scale. Raises ConfigError as above."""
    shared = x_BTHV.shape[2] // B_BTNK.shape[2]
    C_BTHK, B_BTHK = (x.to(x_BTHV.dtype).repeat_interleave(shared, dim=2) for x in (C_BTNK, B_BTNK))
    written = (x_BTHV * dt_BTH.unsqueeze(-1)).to(x_BTHV.dtype)
    g_BTH = dt_BTH.float() * A_H.float()
    kernel = _kernel(*GATED_LINEAR_ATTENTION)
    return run_kernel(kernel, (C_BTHK, B_BTHK, written, g_BTH), initial_state, reset_BT, scale=1.0)


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
