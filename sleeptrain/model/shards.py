"""How one parameter is sharded over tensor parallel ranks: only bookkeeping, no processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class VocabularyPart:
    """The part of a vocabulary that one of `count` pipeline stages predicts: consecutive rows of the head's matrix."""

    index: int
    count: int

    def rows(self, num_rows: int) -> range:
        """The part's share of `num_rows` rows; shares differ by one row at most."""
        return range(num_rows * self.index // self.count, num_rows * (self.index + 1) // self.count)


@dataclass(frozen=True)
class Sharding:
    """How one parameter is sharded over the ranks.

    dim: the dimension that is cut; None: every rank holds the whole parameter.
    pieces: the sizes of the tensors that are fused along dim. Each piece is cut into equal consecutive parts; a rank's
        shard is its part of the first piece, then of the second, and so on.
    padded: zeros after the last row make the only piece divisible.
    partial_gradient: every rank holds the whole parameter but uses it only for the heads of that rank; the gradient is
        the sum over the ranks.
    gathered: for a linear layer's weight: the ranks gather its output columns, since every rank reads all of them.
    part: a rank holds only this part of its shard; its stage of the pipeline has no more.
    heads: for a projection into heads: (number, size) of the heads. With fewer heads than ranks, several ranks use one
        head, and the ranks exchange the projection's outputs.
    """

    dim: int | None = None
    pieces: tuple[int, ...] = ()
    padded: bool = False
    partial_gradient: bool = False
    gathered: bool = False
    heads: tuple[int, int] | None = None
    part: VocabularyPart | None = None

    def take(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The shard of one of `size` ranks, a view if possible. Raises ValueError for a tensor of another shape."""
        if self.dim is None:
            return whole
        if whole.shape[self.dim] != sum(self.pieces):
            raise ValueError(f"{list(whole.shape)} is not {sum(self.pieces)} long in dimension {self.dim}")
        if self.padded and (missing := -self.pieces[0] % size):
            whole = F.pad(whole, (0, 0) * (whole.dim() - 1 - self.dim) + (0, missing))
        parts = [piece.chunk(size, self.dim)[rank] for piece in whole.split(self._pieces(size), self.dim)]
        if self.part is not None:
            rows = self.part.rows(parts[0].shape[self.dim])
            parts = [parts[0].narrow(self.dim, rows.start, len(rows))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def ranges(self, rank: int, size: int) -> list[tuple[int, int]]:
        """The indices [start, stop) along dim that one of `size` ranks holds, in the order of its shard.

        Rows of padding, which come last in a shard, are in none of them.
        """
        found, before = list[tuple[int, int]](), 0
        for piece, padded in zip(self.pieces, self._pieces(size), strict=True):
            start, stop = rank * padded // size, (rank + 1) * padded // size
            if self.part is not None:
                rows = self.part.rows(stop - start)
                start, stop = start + rows.start, start + rows.stop
            found.append((before + min(start, piece), before + min(stop, piece)))
            before += piece
        return found

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor, from the shards of all ranks in order. Raises ValueError if replicas or shapes differ."""
        if self.dim is None:
            if not all(torch.equal(shards[0], other) for other in shards[1:]):
                raise ValueError("the ranks hold different values of a replicated parameter")
            return shards[0]
        sizes = [piece // len(shards) for piece in self._pieces(len(shards))]
        if any(shard.shape[self.dim] != sum(sizes) for shard in shards):
            lengths = [shard.shape[self.dim] for shard in shards]
            raise ValueError(f"shards are {lengths} long in dimension {self.dim}, expected {sum(sizes)} each")
        by_rank = [shard.split(sizes, self.dim) for shard in shards]
        whole = torch.cat([part for piece in zip(*by_rank, strict=True) for part in piece], self.dim)
        return whole.narrow(self.dim, 0, sum(self.pieces))

    def exchanged(self, size: int) -> int:
        """Output channels per token that `size` ranks gather, if this is a linear layer's weight."""
        shared = self.gathered or (self.heads is not None and self.heads[0] % size != 0)
        return sum(self.pieces) if shared else 0

    def whole_shape(self, shard_shape: Sequence[int]) -> tuple[int, ...]:
        whole = list(shard_shape)
        if self.dim is not None:
            whole[self.dim] = sum(self.pieces)
        return tuple(whole)

    def _pieces(self, size: int) -> list[int]:
        pieces = [padded_size(piece, size) for piece in self.pieces] if self.padded else list(self.pieces)
        if any(piece % size for piece in pieces):
            raise ValueError(f"pieces of {pieces} cannot be cut evenly over {size} ranks")
        return pieces


def padded_size(size: int, parts: int) -> int:
    """The smallest multiple of `parts` that is not less than `size`."""
    return -(-size // parts) * parts


@dataclass(frozen=True)
class TensorRank:
    """The place of a mixer's module among tensor ranks.

    gather: [..., C] of this rank -> [..., size * C], the channels of all ranks in the order of ranks.
    """

    rank: int
    size: int
    gather: Callable[[torch.Tensor], torch.Tensor]


def own_heads(num_heads: int, rank: int, size: int) -> range:
    """The heads (or groups) that a rank computes with. With fewer heads than ranks, neighbouring ranks share one."""
    if num_heads % size == 0:
        return range(rank * num_heads // size, (rank + 1) * num_heads // size)
    head = rank * num_heads // size
    return range(head, head + 1)
