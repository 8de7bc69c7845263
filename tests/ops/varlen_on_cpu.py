"""A CPU's implementation of torch's `varlen_attn`, document by document: importing this module registers it.

It masks as FlashAttention does, from the last query and the last key on. Numbers that the kernel would not write are
NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.attention import varlen

CALLS = list[torch.Tensor]()  # the bounds of keys of each call


def _documents(
    bounds_q: torch.Tensor, bounds_k: torch.Tensor, most_q: int, most_k: int
) -> Iterator[tuple[slice, slice]]:
    """The queries and keys of each document. Every document must have queries, and no fewer keys, or nothing."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(bounds_q) == len(bounds_k)
    bounds = zip(bounds_q.tolist(), bounds_k.tolist(), strict=True)
    first_q, first_k = next(bounds)
    assert first_q == first_k == 0
    for last_q, last_k in bounds:
        if (last_q, last_k) == (first_q, first_k):
            continue
        assert 0 < last_q - first_q <= min(most_q, last_k - first_k) and last_k - first_k <= most_k
        yield slice(first_q, last_q), slice(first_k, last_k)
        first_q, first_k = last_q, last_k


def _softmax(q: torch.Tensor, k: torch.Tensor, scale: float, window: list[int]) -> torch.Tensor:
    """Probabilities [H, Q, K] of q [Q, H, D] and k [K, H, D]."""
    reach, ahead = window
    assert ahead == 0
    position = torch.arange(len(q))[:, None] + len(k) - len(q)
    distance = position - torch.arange(len(k))
    near = (distance >= 0) & (distance <= (len(k) if reach < 0 else reach))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores.masked_fill(~near, -math.inf).softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window=None, gqa=False, *more
) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
    CALLS.append(cu_k)
    assert not any(more) and (gqa or query.shape[1] == key.shape[1])
    assert is_causal == (window == [-1, 0]) and query.dtype == key.dtype == value.dtype
    group, out = query.shape[1] // key.shape[1], torch.full_like(query, math.nan)
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    for at_q, at_k in _documents(cu_q, cu_k, max_q, max_k):
        p = _softmax(query[at_q], key[at_k], scale or query.shape[2] ** -0.5, window)
        out[at_q] = torch.einsum("hqk,khd->qhd", p, value[at_k])
    return out, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window=None
) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
    heads, group, scale = key.shape[1], query.shape[1] // key.shape[1], scale or query.shape[2] ** -0.5
    gradients = [torch.full_like(t, math.nan) for t in (query, key, value)]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    for at_q, at_k in _documents(cu_q, cu_k, max_q, max_k):
        q, k, v, dy = query[at_q], key[at_k], value[at_k], grad[at_q]
        p = _softmax(q, k, scale, window)
        dp = torch.einsum("qhd,khd->hqk", dy, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        gradients[0][at_q] = torch.einsum("hqk,khd->qhd", ds, k)
        gradients[1][at_k] = torch.einsum("hqk,qhd->khd", ds, q).unflatten(1, (heads, group)).sum(2)
        gradients[2][at_k] = torch.einsum("hqk,qhd->khd", p, dy).unflatten(1, (heads, group)).sum(2)
    return tuple(gradients)
