"""How one parameter lies on tensor parallel ranks: pure bookkeeping, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sharding:
    """How one parameter lies on the ranks.

    dim: the dimension that is cut; None: every rank holds all. pieces: the sizes along it of what is fused there, each
    of which is cut in equal consecutive parts: a rank's shard is its part of the first piece, of the second, and so on.
    padded: zeros behind the last row make the one piece divisible. partial_gradient: every rank holds all but uses it
    for its own heads only, so that the gradient is the sum over the ranks. gathered: of a linear layer's weight: the
    ranks put their columns together, since all of them read all. heads: of a projection that makes (number, size) of
    heads: where these are fewer than ranks, several ranks read one, and the ranks exchange what they make.
    """

    dim: int | None = None
    pieces: tuple[int, ...] = ()
    padded: bool = False
    partial_gradient: bool = False
    gathered: bool = False
    heads: tuple[int, int] | None = None

    def take(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The shard of `rank` of `size`, a view where it can be. Raises ValueError for a whole of another shape."""
        if self.dim is None:
            return whole
        if whole.shape[self.dim] != sum(self.pieces):
            raise ValueError(f"{list(whole.shape)} is not {sum(self.pieces)} long in dimension {self.dim}")
        if self.padded and (missing := -self.pieces[0] % size):
            whole = F.pad(whole, (0, 0) * (whole.dim() - 1 - self.dim) + (0, missing))
        parts = [piece.chunk(size, self.dim)[rank] for piece in whole.split(self._pieces(size), self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole, from the shards of all ranks in order. Raises ValueError where replicas differ or shapes do."""
        if self.dim is None:
            if not all(torch.equal(shards[0], other) for other in shards[1:]):
                raise ValueError("the ranks hold different values of what should be the same on all")
            return shards[0]
        sizes = [piece // len(shards) for piece in self._pieces(len(shards))]
        if any(shard.shape[self.dim] != sum(sizes) for shard in shards):
            lengths = [shard.shape[self.dim] for shard in shards]
            raise ValueError(f"shards are {lengths} long in dimension {self.dim}, expected {sum(sizes)} each")
        by_rank = [shard.split(sizes, self.dim) for shard in shards]
        whole = torch.cat([part for piece in zip(*by_rank, strict=True) for part in piece], self.dim)
        return whole.narrow(self.dim, 0, sum(self.pieces))

    def exchanged(self, size: int) -> int:
        """Channels a token that `size` ranks put together, where this is a linear layer's weight."""
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


def own_heads(num_heads: int, rank: int, size: int) -> range:
    """The heads (or groups) that a rank computes with; where there are fewer than ranks, neighbours share one."""
    if num_heads % size == 0:
        return range(rank * num_heads // size, (rank + 1) * num_heads // size)
    head = rank * num_heads // size
    return range(head, head + 1)
