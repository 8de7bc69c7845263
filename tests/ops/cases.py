"""Random inputs of the recurrences, and the comparison with an oracle that all these tests use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


def delta_inputs(
    B: int, T: int, H: int, G: int, K: int, V: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    """q, k (unit length), v, g, beta, initial state; leaves."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, T, H, K, generator=draw, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, T, G, V, generator=draw, dtype=torch.float64)
    g, beta = (torch.rand(B, T, G, generator=draw, dtype=torch.float64) for _ in range(2))
    S = torch.randn(B, G, K, V, generator=draw, dtype=torch.float64)
    return leaves([q, torch.nn.functional.normalize(k, dim=-1), v, -2 * g, beta, S], dtype)


def ssd_inputs(
    B: int, T: int, N: int, H: int, K: int, V: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    """C, B, x, dt, A, initial state; leaves."""
    draw = torch.Generator().manual_seed(seed)
    C, Bm = (torch.randn(B, T, N, K, generator=draw, dtype=torch.float64) for _ in range(2))
    x = torch.randn(B, T, H, V, generator=draw, dtype=torch.float64)
    dt, A = torch.rand(B, T, H, generator=draw, dtype=torch.float64), torch.rand(H, generator=draw, dtype=torch.float64)
    S = torch.randn(B, H, K, V, generator=draw, dtype=torch.float64)
    return leaves([C, Bm, x, dt, -3 * A, S], dtype)


def leaves(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def resets(B: int, T: int, *, seed: int = 0) -> torch.Tensor:
    """Random document starts; row 0 has one at its first token and two in succession, the last row has none."""
    draw = torch.Generator().manual_seed(seed)
    reset = torch.rand(B, T, generator=draw) < 0.1
    reset[0, 0] = True
    reset[0, T // 2 : T // 2 + 2] = True
    reset[-1] = False
    return reset


def per_sequence(of_one: Callable[..., Pair], options: int = 0) -> Callable[..., Pair]:
    """An operator of several sequences in one row, as flash-linear-attention's are, from a function of one sequence.

    of_one(*tensors, state, *options), with this number of options.
    """

    def operator(*args) -> Pair:
        rest = args[len(args) - options :]
        *tensors, states, cu_seqlens, chunk_indices = args[: len(args) - options]
        if cu_seqlens is None:
            return of_one(*tensors, states, *rest)
        assert len(tensors[0]) == 1 and len(chunk_indices) >= len(cu_seqlens) - 1
        bounds = enumerate(pairwise(cu_seqlens.tolist()))
        state = [None if states is None else states[i : i + 1] for i in range(len(cu_seqlens) - 1)]
        done = [of_one(*(x[:, first:end] for x in tensors), state[i], *rest) for i, (first, end) in bounds]
        return torch.cat([y for y, _ in done], dim=1), torch.cat([S for _, S in done])

    return operator


def outcome(run: Callable[..., Pair], tensors: Sequence[torch.Tensor], *, seed: int = 1) -> list[torch.Tensor]:
    """Both outputs and the gradients of all tensors for a random cotangent on both outputs."""
    outputs = run(*tensors)
    draw = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, cotangents)]


def worst(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of any tensor, relative to the largest value of that tensor; NaN if a tensor has a NaN."""
    differences = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).cpu()
        for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(differences).max().item()  # Python's max would lose a NaN
