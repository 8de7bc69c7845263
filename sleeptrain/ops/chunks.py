"""Shared code of the chunked recurrences: the cut into chunks, and the decays inside a chunk.

A chunk has C tokens whose interaction is computed by matrix products; only the state passes from chunk to chunk.
Chunked tensors have the chunk first, [n, B, H, C, D], so that the memory of a chunk is contiguous. In batched matrix
products M is n*B*H. A *slab* is a run of chunks that are prepared together. It is small enough to stay in the
processor's cache from one operation to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sleeptrain.ops.inverse import LARGEST_BLOCK, base_block

SLAB_ELEMENTS = 1 << 18  # elements of one tensor [n, B, H, C, K] of a slab


@dataclass(frozen=True)
class Cut:
    """The division of a sequence into chunks.

    num_tokens: T. size: C, tokens of a chunk; the last chunk is padded with zeros. num_chunks: n. slab_chunks: chunks
    of a slab.
    """

    num_tokens: int
    size: int
    num_chunks: int
    slab_chunks: int

    @classmethod
    def of(cls, num_tokens: int, target_size: int, elements_per_token: int) -> Cut:
        """Chunks of about `target_size` tokens. A sequence of up to 1.5 times that is one chunk, without a loop."""
        size = _divisible(-(-num_tokens // max(1, round(num_tokens / target_size))))
        num_chunks = -(-num_tokens // size)
        slab_chunks = max(1, SLAB_ELEMENTS // (size * elements_per_token))
        return cls(num_tokens, size, num_chunks, min(slab_chunks, num_chunks))

    def slabs(self) -> list[slice]:
        """The chunks of each slab, in order."""
        step = self.slab_chunks
        return [slice(first, min(first + step, self.num_chunks)) for first in range(0, self.num_chunks, step)]

    def split(self, x_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [n, B, C, ...], padded with zeros; a view if no padding is needed."""
        padding = self.num_chunks * self.size - self.num_tokens
        if padding:
            x_BT = F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + (0, padding))
        return x_BT.unflatten(1, (self.num_chunks, self.size)).transpose(0, 1)

    def join(self, x_nBC: torch.Tensor) -> torch.Tensor:
        """[n, B, C, ...] -> [B, T, ...], without the padding."""
        return x_nBC.transpose(0, 1).flatten(1, 2)[:, : self.num_tokens]

    def empty(self, like_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(uninitialised tensor [B, T, ...], its view [n, B, C, ...] with the padding, for writing)."""
        batch, _, *inner = like_BT.shape
        padded = like_BT.new_empty(batch, self.num_chunks * self.size, *inner)
        return padded[:, : self.num_tokens], padded.unflatten(1, (self.num_chunks, self.size)).transpose(0, 1)


def _divisible(size: int) -> int:
    """The smallest size, at least `size`, that halves down to a block of at most LARGEST_BLOCK."""
    while base_block(size) > LARGEST_BLOCK:
        size += 1
    return size


class Decays:
    """The log decays of all chunks, and decay factors that are computed from them.

    log2_nBHC: sum of the log decays from the chunk's (or the document's) first token to each token. fp64, because
    differences of these sums are used. In units of log 2, because exp2 is several times faster than exp on a CPU and
    does not slow down at underflow.
    into_nBHC: decay of the state before the chunk up to each token.
    out_nBHC: decay of each token's write up to the end of the chunk.
    total_nBH: decay of the state before the chunk up to the end of the chunk.
    All decays across the start of a document are exactly zero.
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
            # The first decay of a document has no effect, because the state is zero. Each token sums the decays of its
            # document only, because a cumulative sum over the chunk would mix rounding errors between documents.
            self.log2_nBHC = _apply(self.earlier_nB1CC, log2_nBHC.masked_fill(self.reset_nB1C, 0.0))
        self.into_nBHC = torch.exp2(self.log2_nBHC).to(self.dtype)
        self.out_nBHC = torch.exp2(self.log2_nBHC[..., -1:] - self.log2_nBHC).to(self.dtype)
        if self.reset_nB1C is not None:
            self.into_nBHC = self.into_nBHC.masked_fill(document_nB1C != 0, 0.0)
            self.out_nBHC = self.out_nBHC.masked_fill(document_nB1C != document_nB1C[..., -1:], 0.0)
        self.total_nBH = self.into_nBHC[..., -1]

    def between(self, slab: slice) -> torch.Tensor:
        """[n, B, H, C, C]: decay from the column's token to the row's token; zero above the diagonal."""
        log2_nBHC = self.log2_nBHC[slab]
        decay = log2_nBHC.new_empty(*log2_nBHC.shape, log2_nBHC.shape[-1], dtype=self.dtype)
        torch.sub(log2_nBHC.unsqueeze(-1), log2_nBHC.unsqueeze(-2), out=decay)
        # Masked before and after exp2: a masked pair may have a positive exponent, and 0 * inf is not 0.
        if self.reset_nB1C is None:
            return decay.tril_().exp2_().tril_()
        earlier = self.earlier_nB1CC[slab]
        return decay.mul_(earlier).exp2_().mul_(earlier)

    def backward(self, dlog_nBHC: torch.Tensor) -> torch.Tensor:
        """Gradient of the summed log decays (natural log) [n, B, H, C] -> gradient of g [n, B, C, H]."""
        if self.reset_nB1C is None:
            dg_nBHC = dlog_nBHC.flip(-1).cumsum(-1).flip(-1)
        else:
            dg_nBHC = _apply(self.earlier_nB1CC.transpose(-1, -2), dlog_nBHC).masked_fill(self.reset_nB1C, 0.0)
        return dg_nBHC.transpose(2, 3)


def decay_gradient(within: torch.Tensor, by_end: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The gradient of the summed log decays, [..., C], as the sum of its parts.

    within [..., C]: the part through the pairs of tokens in the chunk and through reads of the state before the chunk.
    by_end [..., C]: the part through each token's write in the state after the chunk. It grows with the last sum and
    shrinks with the token's own sum; that of the last token depends on neither.
    total [...]: the part through the state before the chunk in the state after the chunk.
    """
    dlog = within.clone()
    dlog[..., :-1] -= by_end[..., :-1]
    dlog[..., -1] += by_end[..., :-1].sum(-1) + total
    return dlog


def _apply(M_nB1CC: torch.Tensor, x_nBHC: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nbij,nbhj->nbhi", M_nB1CC.squeeze(2).to(x_nBHC.dtype), x_nBHC)
