"""What the chunked recurrences share: the cut into chunks, and the decays inside a chunk.

A chunk is C tokens whose interaction is computed as matrices; only the state passes from one to the next. Chunked
tensors put the chunk first, [n, B, H, C, D], so that one chunk is one contiguous piece; where a product takes a batch
of matrices, M is n*B*H. A *slab* is a run of chunks that is prepared together, small enough to stay in the processor's
cache from one operation to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sleeptrain.ops.inverse import LARGEST_BLOCK, base_block

SLAB_ELEMENTS = 1 << 18  # of one tensor [n, B, H, C, K]


@dataclass(frozen=True)
class Cut:
    """num_chunks chunks of `size` tokens, the last one filled up with inert tokens; prepared slab_chunks at a time."""

    num_tokens: int
    size: int
    num_chunks: int
    slab_chunks: int

    @classmethod
    def of(cls, num_tokens: int, wanted_size: int, elements_per_token: int) -> Cut:
        """Chunks near `wanted_size`; a sequence up to 1.5 times as long is one chunk, so that it pays for no loop."""
        size = _divisible(-(-num_tokens // max(1, round(num_tokens / wanted_size))))
        num_chunks = -(-num_tokens // size)
        slab_chunks = max(1, SLAB_ELEMENTS // (size * elements_per_token))
        return cls(num_tokens, size, num_chunks, min(slab_chunks, num_chunks))

    def slabs(self) -> list[slice]:
        """The chunks of each slab, in order."""
        step = self.slab_chunks
        return [slice(first, min(first + step, self.num_chunks)) for first in range(0, self.num_chunks, step)]

    def split(self, x_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [n, B, C, ...], a view where no filling is needed; filled with zeros."""
        missing = self.num_chunks * self.size - self.num_tokens
        if missing:
            x_BT = F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, missing))
        return x_BT.unflatten(1, (self.num_chunks, self.size)).transpose(0, 1)

    def join(self, x_nBC: torch.Tensor) -> torch.Tensor:
        """[n, B, C, ...] -> [B, T, ...], without the filling."""
        return x_nBC.transpose(0, 1).flatten(1, 2)[:, : self.num_tokens]

    def empty(self, like_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An uninitialised [B, T, ...] and the [n, B, C, ...] view, filling included, through which it is written."""
        batch, _, *inner = like_BT.shape
        whole = like_BT.new_empty(batch, self.num_chunks * self.size, *inner)
        return whole[:, : self.num_tokens], whole.unflatten(1, (self.num_chunks, self.size)).transpose(0, 1)


def _divisible(size: int) -> int:
    """The next size that halves down to a block the inverse substitutes."""
    while base_block(size) > LARGEST_BLOCK:
        size += 1
    return size


class Decays:
    """The log decays of all chunks and the factors made of them.

    log2_nBHC: sum of the log decays from the chunk's (or the document's) first token up to a token, in fp64 because
    differences of these sums matter, and in units of log 2 because exp2 is several times faster than exp on a CPU and
    does not slow down where it underflows.
    into_nBHC: what is left at a token of the state before the chunk. out_nBHC: what is left of a token at the chunk's
    end. whole_nBH: what is left of the state at the chunk's end. Across a document's start each is exactly zero.
    """

    def __init__(self, g_nBCH: torch.Tensor, reset_nBC: torch.Tensor | None):
        self.dtype = g_nBCH.dtype
        log2_nBHC = g_nBCH.transpose(2, 3).double() * math.log2(math.e)
        self.reset_nB1C = None if reset_nBC is None else reset_nBC.unsqueeze(2)
        if self.reset_nB1C is None:
            self.log2_nBHC = log2_nBHC.cumsum(-1)
        else:
            document_nB1C = self.reset_nB1C.cumsum(-1)
            same_nB1CC = document_nB1C.unsqueeze(-1) == document_nB1C.unsqueeze(-2)
            self.earlier_nB1CC = same_nB1CC.tril().to(self.dtype)
            # A document's first decay meets a zero state. A running sum over the whole chunk would let the rounding of
            # one document into the next, so each token sums its own document only.
            self.log2_nBHC = _apply(self.earlier_nB1CC, log2_nBHC.masked_fill(self.reset_nB1C, 0.0))
        self.into_nBHC = torch.exp2(self.log2_nBHC).to(self.dtype)
        self.out_nBHC = torch.exp2(self.log2_nBHC[..., -1:] - self.log2_nBHC).to(self.dtype)
        if self.reset_nB1C is not None:
            self.into_nBHC = self.into_nBHC.masked_fill(document_nB1C != 0, 0.0)
            self.out_nBHC = self.out_nBHC.masked_fill(document_nB1C != document_nB1C[..., -1:], 0.0)
        self.whole_nBH = self.into_nBHC[..., -1]

    def between(self, slab: slice) -> torch.Tensor:
        """[n, B, H, C, C]: what is left at the row's token of the column's; zero above the diagonal."""
        log2_nBHC = self.log2_nBHC[slab]
        left = log2_nBHC.new_empty(*log2_nBHC.shape, log2_nBHC.shape[-1], dtype=self.dtype)
        torch.sub(log2_nBHC.unsqueeze(-1), log2_nBHC.unsqueeze(-2), out=left)
        # Masked before and after: a pair that does not count may have a positive exponent, and 0 * inf is not 0.
        if self.reset_nB1C is None:
            return left.tril_().exp2_().tril_()
        earlier = self.earlier_nB1CC[slab]
        return left.mul_(earlier).exp2_().mul_(earlier)

    def backward(self, dlog_nBHC: torch.Tensor) -> torch.Tensor:
        """From the gradient of the summed log decays (natural units) to that of g, [n, B, C, H]."""
        if self.reset_nB1C is None:
            dg_nBHC = dlog_nBHC.flip(-1).cumsum(-1).flip(-1)
        else:
            dg_nBHC = _apply(self.earlier_nB1CC.transpose(-1, -2), dlog_nBHC).masked_fill(self.reset_nB1C, 0.0)
        return dg_nBHC.transpose(2, 3)


def decay_gradient(within: torch.Tensor, by_end: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The gradient of the summed log decays, [..., C], from what the tokens of a chunk take part in.

    within [..., C]: their pairs and their reading of the state before. by_end [..., C]: their part in the state after,
    which grows with the last sum and shrinks with their own; the last token's does not depend on either. whole [...]:
    the part of the state before in the state after.
    """
    dlog = within.clone()
    dlog[..., :-1] -= by_end[..., :-1]
    dlog[..., -1] += by_end[..., :-1].sum(-1) + whole
    return dlog


def _apply(M_nB1CC: torch.Tensor, x_nBHC: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nbij,nbhj->nbhi", M_nB1CC.squeeze(2).to(x_nBHC.dtype), x_nBHC)
