"""Operators whose kernels no compiler fuses with others: what each launches, computes and takes.

Counts of kernels are read off flash-linear-attention 0.6 and torch 2.13. Times, where there is one, are on an H200;
they are published or stem from published throughputs, and none is a measurement of this code:

* Gated delta rule and Mamba-2's recurrence: `recurrence_times.py`.
* Attention: 350 TFLOP/s forward and 280 backward for FlashAttention-2 on Hopper at widths of 64 to 256 (arXiv
  2307.08691, figures for H100), at least 20 and 60 us. With a mask torch has no such kernel for grouped queries and
  computes in steps: fp32 products at 45 TFLOP/s, and 10 and 14 passes over the scores in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.recurrence_times import (
    DELTA_RULE,
    DELTA_RULE_BACKWARD,
    LINEAR_ATTENTION,
    LINEAR_ATTENTION_BACKWARD,
    RecurrenceTime,
)

CHUNK = 64
BANDWIDTH = 0.8 * 4.8e12  # bytes/s of an H200's memory that kernels reach


@dataclass(frozen=True)
class Opaque:
    """kernels: that a call launches. flops: a multiply-add is two. h200: seconds on an H200; 0: bytes decide."""

    kind: Kind
    kernels: int
    flops: int = 0
    h200: float = 0.0


@dataclass(frozen=True)
class Documents:
    """The documents into which rows are cut.

    pairs: attending pairs of tokens. chunks: of recurrences; None: as many as the operator gets, which for CUDA graphs
    are more: empty ones belong to no document.
    """

    pairs: int = 0
    chunks: int | None = None


# Called with an operator's arguments, its keyword arguments, and the documents.
Cost = Callable[[Sequence[Any], Mapping[str, Any], Documents], Opaque]


def _norm(kernels: int) -> Cost:
    return lambda args, kwargs, documents: Opaque(Kind.NORM, kernels)


def _loss(kernels: int) -> Cost:
    return lambda args, kwargs, documents: Opaque(Kind.LOSS, kernels)


def _recurrence(time: RecurrenceTime, first: int, times: float) -> Cost:
    """first: the place of k among the arguments; v follows. times: FLOPs against the forward."""

    def cost(args: Sequence[Any], kwargs: Mapping[str, Any], documents: Documents) -> Opaque:
        k, v = args[first : first + 2]
        (rows, length, _, K), (heads, V) = k.shape, v.shape[2:]
        per_token = 2 * CHUNK * (3 * K + 2 * V) + 6 * K * V
        chunks = _chunks(args, length, documents)
        flops = int(times * rows * length * heads * per_token)
        return Opaque(Kind.RECURRENCE, time.kernels, flops, time.seconds(rows, chunks, rows * length, heads, K * V))

    return cost


def _chunks(args: Sequence[Any], length: int, documents: Documents) -> int:
    """Chunks of a row: those of its documents where it has several (`Segments.chunk_indices`, [chunks, 2])."""
    found = [t.shape[0] for t in args if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == 2]
    if found and documents.chunks is not None:
        return documents.chunks
    return found[0] if found else -(-length // CHUNK)


FORWARD, BACKWARD = 1.0, 2.5  # FLOPs against the forward


def _attention(q: torch.Tensor, pairs: int, masked: bool, backward: bool, heads_dim: int) -> Opaque:
    """pairs: attending pairs of tokens in all rows, without heads."""
    heads, dim = q.shape[heads_dim], q.shape[-1]
    products = 5 if backward else 2
    flops = 2 * products * heads * dim * pairs
    if masked:
        scores = heads * pairs * 4 * (14 if backward else 10)
        kernels = 20 if backward else 14
        flops = flops * 4 // 5 if backward else flops
        return Opaque(Kind.ATTENTION, kernels, flops, flops / 45e12 + scores / BANDWIDTH)
    rate, least = (280e12, 6e-5) if backward else (350e12, 2e-5)
    return Opaque(Kind.ATTENTION, 3 if backward else 1, flops, max(flops / rate, least))


def _dense(backward: bool) -> Cost:
    """torch's attention over whole rows. A masked one computes all pairs."""

    def cost(args: Sequence[Any], kwargs: Mapping[str, Any], documents: Documents) -> Opaque:
        q, k = args[1:3] if backward else args[:2]
        rows, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        masked = kwargs.get("attn_mask") is not None
        causal = args[7 if backward else 4] if len(args) > (7 if backward else 4) else False
        seen = queries * (queries + 1) // 2 if causal and not masked else queries * keys
        return _attention(q, rows * seen, masked, backward, heads_dim=1)

    return cost


def _varlen(backward: bool) -> Cost:
    """Attention over documents laid end to end, [tokens, heads, dim]."""

    def cost(args: Sequence[Any], kwargs: Mapping[str, Any], documents: Documents) -> Opaque:
        q = args[1 if backward else 0]
        return _attention(q, documents.pairs or q.shape[0] * (q.shape[0] + 1) // 2, False, backward, heads_dim=1)

    return cost


OPAQUE: dict[str, Cost] = {
    "sleeptrain::rms_norm": _norm(1),
    "sleeptrain::add_rms_norm": _norm(1),
    "sleeptrain::rms_norm_backward": _norm(2),  # then a sum of the weight's gradient over parts
    "sleeptrain::gated_rms_norm": _norm(1),
    "sleeptrain::gated_rms_norm_backward": _norm(2),
    "sleeptrain::l2norm": _norm(1),
    "sleeptrain::l2norm_backward": _norm(1),
    "sleeptrain::swiglu": _norm(1),
    "sleeptrain::swiglu_backward": _norm(1),
    "sleeptrain::short_convolution": lambda args, kwargs, documents: Opaque(Kind.NORM, 1 + args[6]),  # then the cache
    "sleeptrain::short_convolution_backward": _norm(3),  # what SiLU read, the gradients, the sum of the weight's
    "sleeptrain::cross_entropy": _loss(2),  # over parts of the vocabulary, then over the parts
    "sleeptrain::cross_entropy_backward": _loss(1),
    "sleeptrain::gated_delta_rule": _recurrence(DELTA_RULE, 1, FORWARD),
    "sleeptrain::gated_delta_rule_backward": _recurrence(DELTA_RULE_BACKWARD, 3, BACKWARD),
    "sleeptrain::gated_linear_attention": _recurrence(LINEAR_ATTENTION, 1, FORWARD),
    "sleeptrain::gated_linear_attention_backward": _recurrence(LINEAR_ATTENTION_BACKWARD, 3, BACKWARD),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _dense(backward=False),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _dense(backward=True),
    "torch_attn::_varlen_attn": _varlen(backward=False),
    "torch_attn::_varlen_attn_backward": _varlen(backward=True),
}
