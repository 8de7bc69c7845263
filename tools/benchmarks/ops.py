"""Our chunked recurrences against the PyTorch paths of transformers, forward and backward, on one thread.

Both sides get the same inputs, an initial state that needs a gradient, and cotangents of the output and the last state.
transformers runs with its defaults: chunks of 64 for the delta rule, of 256 (Mamba2Config) for Mamba-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from benchmarks import Row
from benchmarks.timing import METHOD as METHOD
from benchmarks.timing import round_robin
from sleeptrain.ops import gated_delta_rule, ssd

Pair = tuple[torch.Tensor, torch.Tensor]
B, T = 4, 1024


def run(quick: bool) -> list[Row]:
    from transformers.models.mamba2 import modeling_mamba2
    from transformers.models.qwen3_5 import modeling_qwen3_5

    torch.set_num_threads(1)
    rounds = 3 if quick else 10
    delta_rule = _torch_path(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    scan = _torch_path(modeling_mamba2.mamba2_chunk_scan)
    rows = []
    for key_dim, goal in ((128, 2.0), (64, 2.2)):
        rows += _delta_rule_rows(delta_rule, key_dim, goal, rounds)
    return rows + _ssd_rows(scan, 4.0, rounds)


def _torch_path(function: Callable[..., Pair]) -> Callable[..., Pair]:
    """The PyTorch function that transformers may have replaced by an installed kernel."""
    return getattr(function, "__wrapped__", function)


def _delta_rule_rows(theirs: Callable[..., Pair], key_dim: int, goal: float, rounds: int) -> list[Row]:
    heads, value_dim = 4, 128
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, heads, key_dim) for _ in range(2))
    v, S = torch.randn(B, T, heads, value_dim), torch.randn(B, heads, key_dim, value_dim)
    g, beta = -0.1 * torch.rand(B, T, heads), torch.rand(B, T, heads)
    tensors = [q, F.normalize(k, dim=-1), v, g, beta, S]
    candidates = {
        "transformers": lambda *x: theirs(*x[:5], initial_state=x[5], output_final_state=True),
        "save": lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], implementation="chunked"),
        "recompute": lambda *x: gated_delta_rule(
            *x[:5], initial_state=x[5], implementation="chunked", memory="recompute"
        ),
    }
    return _compare(f"gated_delta_rule K={key_dim} V={value_dim}", candidates, tensors, goal, rounds)


def _ssd_rows(theirs: Callable[..., Pair], goal: float, rounds: int) -> list[Row]:
    heads, value_dim, key_dim, groups, their_chunk = 8, 64, 128, 1, 256
    torch.manual_seed(0)
    C, B_BTNK = (torch.randn(B, T, groups, key_dim) for _ in range(2))
    x, dt = torch.randn(B, T, heads, value_dim), 0.1 * torch.rand(B, T, heads)
    tensors = [C, B_BTNK, x, dt, -torch.rand(heads), torch.randn(B, heads, key_dim, value_dim)]

    def scan(*inputs: torch.Tensor) -> Pair:
        C, B_BTNK, x, dt, A, S = inputs
        y, S = theirs(x, dt, A, B_BTNK, C, their_chunk, initial_states=S.mT, return_final_states=True)
        return y, S.mT

    candidates = {
        "transformers": scan,
        "save": lambda *x: ssd(*x[:5], initial_state=x[5], implementation="chunked"),
        "recompute": lambda *x: ssd(*x[:5], initial_state=x[5], implementation="chunked", memory="recompute"),
    }
    return _compare(f"ssd K={key_dim} V={value_dim}", candidates, tensors, goal, rounds)


def _compare(
    name: str,
    candidates: dict[str, Callable[..., Pair]],
    tensors: Sequence[torch.Tensor],
    goal: float,
    rounds: int,
) -> list[Row]:
    leaves = [x.requires_grad_() for x in tensors]
    with torch.no_grad():
        cotangents = [torch.randn_like(x) for x in candidates["transformers"](*leaves)]

    def step(candidate: Callable[..., Pair]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(candidate(*leaves), leaves, cotangents)

    seconds = round_robin({key: step(candidate) for key, candidate in candidates.items()}, rounds)
    theirs = seconds["transformers"]
    return [
        Row(f"{name}: times faster than transformers", theirs / seconds["save"], "x", goal),
        Row(f"{name}, recompute: times faster than transformers", theirs / seconds["recompute"], "x"),
        Row(f"{name}: ours", seconds["save"] * 1e3, "ms", better="lower"),
        Row(f"{name}: transformers", theirs * 1e3, "ms", better="lower"),
    ]
