"""Causal attention inside documents that share rows, by FlashAttention: it needs no mask of all pairs of tokens.

torch's `varlen_attn` reads the rows laid end to end and the bounds of each document. The last query of a document sees
the last key, so a document may have keys in front of its first query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.segments import padded_count, repeat_last

MOST_HEAD_DIM = 256
BLOCK = 128  # tokens that the kernel takes at once, at most


class DocumentBounds(NamedTuple):
    """Where the stretches of R rows of L tokens begin and end, as the kernel reads them.

    A stretch is the tokens of one document in a row, or a row's consecutive pads. Pads attend to pads: nobody reads
    their outputs, and no token need be moved.

    queries: int32 [stretches + 1], bounds in the flattened [R * L].
    keys: int32 [stretches + 1], bounds in the keys that take part.
    most_queries, most_keys: no stretch has more. They are powers of two, so that a compiled block sees few values.
    key_index: int64, the keys that take part, in the flattened [R * (C + L)] with C earlier keys before each row; None:
        all keys.
    whole_rows: each row is one stretch without earlier keys.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int
    key_index: torch.Tensor | None
    whole_rows: bool


def fits_kernel(element: int, head_dim: int) -> bool:
    """True if the kernel takes heads of this width, in a dtype of `element` bytes: bf16 or fp16."""
    return element == 2 and head_dim % 8 == 0 and head_dim <= MOST_HEAD_DIM


def runs_kernel(like: torch.Tensor, dtype: torch.dtype, head_dim: int) -> bool:
    """True if the kernel computes attention on the device of `like`, in this dtype and for heads of this width."""
    return runs_kernels(like) and fits_kernel(dtype.itemsize, head_dim)


def document_bounds(documents_RL: torch.Tensor) -> DocumentBounds:
    """The bounds of rows with these ids. It reads them, so a step calls it on the CPU, ahead of its rounds."""
    num_rows, num_tokens = documents_RL.shape
    begins = first_of_stretch(documents_RL).flatten().nonzero().squeeze(1)
    bounds = torch.cat([begins, begins.new_tensor([num_rows * num_tokens])]).int()
    most = _power_of_two(num_tokens)
    return DocumentBounds(bounds, bounds, most, most, None, len(begins) == num_rows)


def after_earlier_keys(bounds: DocumentBounds, counts_R: torch.Tensor, num_earlier: int) -> DocumentBounds:
    """The bounds with C = `num_earlier` keys before each row, of which the row's first stretch has the last counts_R.

    bounds, counts_R (int64, at most C): on the CPU. Other earlier keys take no part.
    """
    num_rows, total = len(counts_R), int(bounds.queries[-1])
    num_tokens = total // num_rows
    # A bound inside row r, or at its end, comes after the earlier keys of the rows 0 .. r.
    earlier = torch.cat([counts_R.new_zeros(1), counts_R.cumsum(0)])
    keys = bounds.queries + earlier[(bounds.queries + num_tokens - 1) // num_tokens].int()
    takes_part = torch.arange(num_earlier + num_tokens) >= num_earlier - counts_R[:, None]
    index = None if bool(takes_part.all()) else takes_part.flatten().nonzero().squeeze(1)
    return DocumentBounds(
        bounds.queries, keys, bounds.most_queries, _power_of_two(num_earlier + num_tokens), index, False
    )


def bounds_of_fixed_size(bounds: DocumentBounds) -> DocumentBounds:
    """The bounds, and behind them empty stretches, so that their number hardly depends on the documents.

    The keys that take part keep their number, which `key_index` has.
    """
    empty = padded_count(len(bounds.queries) - 1) - (len(bounds.queries) - 1)
    return bounds._replace(queries=repeat_last(bounds.queries, empty), keys=repeat_last(bounds.keys, empty))


def first_of_stretch(documents_RL: torch.Tensor) -> torch.Tensor:
    """bool [R, L]: True at the first token of each stretch."""
    begins = torch.ones_like(documents_RL, dtype=torch.bool)
    begins[:, 1:] = documents_RL[:, 1:] != documents_RL[:, :-1]
    return begins


def attend_in_documents(
    q_RLHD: torch.Tensor,
    k_RKGD: torch.Tensor,
    v_RKGD: torch.Tensor,
    bounds: DocumentBounds,
    reach: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of each token to its document, up to itself: [R, L, H, D].

    k_RKGD, v_RKGD: K = L, or K = C + L with earlier keys. H is a multiple of G. reach: a token sees at most the last
    `reach` tokens, itself included; None: no limit. scale: of the scores; None: 1 / sqrt(D).
    """
    q, k, v = (t.flatten(0, 1) for t in (q_RLHD, k_RKGD, v_RKGD))
    if bounds.key_index is not None:
        k, v = k.index_select(0, bounds.key_index), v.index_select(0, bounds.key_index)
    y = varlen_attn(
        q,
        k,
        v,
        bounds.queries,
        bounds.keys,
        bounds.most_queries,
        bounds.most_keys,
        scale=scale,
        window_size=(-1 if reach is None else reach - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(y, torch.Tensor)
    return y.unflatten(0, q_RLHD.shape[:2])


def _power_of_two(tokens: int) -> int:
    return max(BLOCK, 1 << (tokens - 1).bit_length())
