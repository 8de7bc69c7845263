"""The recurrences that models call, and the choice of their implementation.

`implementation`: "auto" uses the Triton kernels of flash-linear-attention for CUDA tensors (except fp64, which the
kernels do not support) and the chunked PyTorch form for all others. The choice depends on the tensors, never on the
installed packages. For one token without gradient, as in decoding, "auto" uses the plain step of `step.py`. "chunked",
"fla" and "reference" (a token loop with plain autograd) choose one implementation.

`memory`, for the chunked form only: "save" keeps the intermediates for the backward, "recompute" keeps the inputs and a
few states and computes the intermediates again.
"""

from __future__ import annotations

import torch

from sleeptrain.errors import ConfigError
from sleeptrain.ops import fla, reference, step
from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.gated_delta_rule import gated_delta_rule as chunked_gated_delta_rule
from sleeptrain.ops.segments import Segments
from sleeptrain.ops.ssd import ssd as chunked_ssd

IMPLEMENTATIONS = ("auto", "chunked", "reference", "fla")
MEMORIES = ("save", "recompute")


def choose(implementation: str, memory: str, like: torch.Tensor) -> str:
    """The implementation for tensors like `like`. Raises ConfigError for an unknown or impossible one."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation={implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if memory not in MEMORIES:
        raise ConfigError(f"memory={memory!r} is none of {', '.join(MEMORIES)}")
    if implementation == "auto":
        return "fla" if runs_kernels(like) else "chunked"
    if implementation == "fla" and not runs_kernels(like):
        raise ConfigError(
            f"implementation='fla' runs on CUDA tensors of at most 32 bits, not on {like.dtype} on {like.device}: "
            "use 'auto' or 'chunked', or move the model to a GPU"
        )
    return implementation


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTGV: torch.Tensor,
    g_BTG: torch.Tensor,
    beta_BTG: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    segments: Segments | None = None,
    qk_l2norm: bool = False,
    implementation: str = "auto",
    memory: str = "save",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K).

    Gated DeltaNet, arXiv 2412.06464, equation 10. Key head i of H serves the value heads i*G/H .. (i+1)*G/H - 1.
    g is the log decay, at most 0. qk_l2norm: q and k are divided by sqrt(sum of squares + 1e-6) first.
    initial_state: [B, G, K, V], None for zeros. reset_BT: bool, S is zeroed before the token is read; no value and no
    gradient crosses a reset. segments: `cut_at_resets(reset_BT)`, if it is known; kernels cut by it. A token with g = 0
    and beta = 0 leaves S exactly unchanged. Returns (o_BTGV in v's dtype,
    the last state S_BGKV in fp32). Computed in fp32, in fp64 if an input is fp64. Both are differentiable, once. Raises
    ConfigError for an unknown or impossible implementation, ValueError for shapes that do not match.
    """
    batch, num_tokens, num_heads, key_dim = k_BTHK.shape
    value_heads, value_dim = v_BTGV.shape[2:]
    if value_heads % num_heads:
        raise ValueError(f"{value_heads} value heads cannot share {num_heads} key heads evenly")
    _check(q_BTHK, "q", (batch, num_tokens, num_heads, key_dim))
    _check(v_BTGV, "v", (batch, num_tokens, value_heads, value_dim))
    _check(g_BTG, "g", (batch, num_tokens, value_heads))
    _check(beta_BTG, "beta", (batch, num_tokens, value_heads))
    _check(initial_state, "initial_state", (batch, value_heads, key_dim, value_dim))
    _check(reset_BT, "reset_BT", (batch, num_tokens))
    tensors = (q_BTHK, k_BTHK, v_BTGV, g_BTG, beta_BTG)
    chosen = choose(implementation, memory, v_BTGV)
    with _without_autocast(v_BTGV):
        if implementation == "auto" and _is_step(num_tokens, reset_BT):
            return step.gated_delta_rule(*tensors, initial_state=initial_state, qk_l2norm=qk_l2norm)
        if chosen == "chunked":
            return chunked_gated_delta_rule(
                *tensors, initial_state=initial_state, reset_BT=reset_BT, qk_l2norm=qk_l2norm, memory=memory
            )
        if chosen == "fla":
            return fla.gated_delta_rule(
                *tensors, initial_state=initial_state, reset_BT=reset_BT, segments=segments, qk_l2norm=qk_l2norm
            )
        return reference.gated_delta_rule(*tensors, initial_state=initial_state, reset_BT=reset_BT, qk_l2norm=qk_l2norm)


def ssd(
    C_BTNK: torch.Tensor,
    B_BTNK: torch.Tensor,
    x_BTHV: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    segments: Segments | None = None,
    implementation: str = "auto",
    memory: str = "save",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T, y_t = S_t^T C_t (Mamba-2, arXiv 2405.21060, section 2).

    The heads i*H/N .. (i+1)*H/N - 1 form group i of N and share B and C. dt is at least 0, A at most 0. A token with
    dt = 0 leaves S exactly unchanged. initial_state: [B, H, K, V], None for zeros. reset_BT, segments, the returned
    dtypes and the errors are as in `gated_delta_rule`. Returns (y_BTHV, S_BHKV).
    """
    batch, num_tokens, num_groups, key_dim = B_BTNK.shape
    num_heads, value_dim = x_BTHV.shape[2:]
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} heads cannot share {num_groups} groups evenly")
    _check(C_BTNK, "C", (batch, num_tokens, num_groups, key_dim))
    _check(x_BTHV, "x", (batch, num_tokens, num_heads, value_dim))
    _check(dt_BTH, "dt", (batch, num_tokens, num_heads))
    _check(A_H, "A", (num_heads,))
    _check(initial_state, "initial_state", (batch, num_heads, key_dim, value_dim))
    _check(reset_BT, "reset_BT", (batch, num_tokens))
    tensors = (C_BTNK, B_BTNK, x_BTHV, dt_BTH, A_H)
    chosen = choose(implementation, memory, x_BTHV)
    with _without_autocast(x_BTHV):
        if implementation == "auto" and _is_step(num_tokens, reset_BT):
            return step.ssd(*tensors, initial_state=initial_state)
        if chosen == "chunked":
            return chunked_ssd(*tensors, initial_state=initial_state, reset_BT=reset_BT, memory=memory)
        if chosen == "fla":
            return fla.ssd(*tensors, initial_state=initial_state, reset_BT=reset_BT, segments=segments)
        return reference.ssd(*tensors, initial_state=initial_state, reset_BT=reset_BT)


def _is_step(num_tokens: int, reset_BT: torch.Tensor | None) -> bool:
    return num_tokens == 1 and reset_BT is None and not torch.is_grad_enabled()


def _without_autocast(like: torch.Tensor) -> torch.autocast:
    """Disable autocast, which would round the products with the state to bf16."""
    return torch.autocast(like.device.type, enabled=False)


def _check(x: torch.Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
