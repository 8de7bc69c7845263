"""The order of one source's documents, epoch after epoch, as positions on an endless line.

Epoch e takes the positions [e*E, (e+1)*E). Its shards are shuffled and put into groups of a few shards each, and the
documents of each group are shuffled. So every epoch has its own order, which depends on (seed, name of the source,
epoch) only. Finding the document at any position needs the sidecars of only one group of shards.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from sleeptrain.data.philox import named_stream, random_order

# A document of a line takes the positions [begin, begin + size). length: tokens. shard, index: its number.
DOCUMENT = np.dtype([("begin", "i8"), ("size", "i8"), ("length", "i8"), ("shard", "i4"), ("index", "i4")])
GROUPS_HELD = 64  # a group of eight shards of 64 MiB with documents of 1,000 tokens takes about 10 MB
EPOCHS_HELD = 4


class ShardedDocuments(Protocol):
    """A source's documents, numbered shard by shard. See `data.shards.TokenShards`."""

    @property
    def num_shards(self) -> int: ...

    @property
    def shard_tokens_S(self) -> np.ndarray: ...

    @property
    def shard_documents_S(self) -> np.ndarray: ...

    def lengths(self, shard: int) -> np.ndarray: ...

    def document(self, shard: int, index: int) -> np.ndarray: ...

    def prefetch(self, shard: int) -> None: ...


class Line:
    """The documents of `shards` in order.

    name: name of the source, part of the random streams.
    shuffle_shards: number of shards in a group. Any shards may form a group; documents are shuffled inside a group.
    unit: the number of positions of a document is its number of tokens, rounded up to a multiple of this.
    epoch_size: E, the number of positions of an epoch.
    """

    def __init__(self, shards: ShardedDocuments, name: str, seed: int, shuffle_shards: int = 8, unit: int = 1) -> None:
        self._shards = shards
        self._name = name
        self._seed = seed
        self._group_shards = shuffle_shards
        self._unit = unit
        self._shard_sizes_S = self._sizes()
        self.epoch_size = int(self._shard_sizes_S.sum())
        self._epoch = lru_cache(EPOCHS_HELD)(self._order_shards)
        self._group = lru_cache(GROUPS_HELD)(self._order_documents)

    def documents(self, begin: int, end: int) -> np.ndarray:
        """The documents that begin at the positions [begin, end), in order: DOCUMENT [D]."""
        parts = [np.empty(0, DOCUMENT)]
        position = begin
        while position < end:
            group, group_end = self._group_at(position)
            first, last = np.searchsorted(group["begin"], [begin, end])
            parts.append(group[first:last])
            position = group_end
        return np.concatenate(parts)

    def document_at(self, position: int) -> np.void:
        """The document that takes `position`: one DOCUMENT."""
        group, _ = self._group_at(position)
        return group[np.searchsorted(group["begin"], position, side="right") - 1]

    def next_begin(self, position: int) -> int:
        """The first position, from `position` on, at which a document begins."""
        group, end = self._group_at(position)
        following = int(np.searchsorted(group["begin"], position))
        return int(group["begin"][following]) if following < len(group) else end

    def group_end(self, position: int) -> int:
        """The position at which the group of `position` ends."""
        return self._group_at(position)[1]

    def prefetch(self, position: int) -> None:
        """Request the shards of the group at `position`, so that later reads do not wait."""
        epoch, group = self._locate(position)
        for shard in self._shards_of(epoch, group):
            self._shards.prefetch(int(shard))

    def _group_at(self, position: int) -> tuple[np.ndarray, int]:
        """The documents of the group at `position`, and the position at which it ends."""
        return self._group(*self._locate(position))

    def _locate(self, position: int) -> tuple[int, int]:
        epoch, rest = divmod(position, self.epoch_size)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], rest, side="right")) - 1

    def _sizes(self) -> np.ndarray:
        """Number of positions of each shard, int64 [S]. Reads the document lengths only if the unit is above one."""
        if self._unit == 1:
            return self._shards.shard_tokens_S
        counts = range(self._shards.num_shards)
        return np.array([self._rounded(self._shards.lengths(shard)).sum() for shard in counts], np.int64)

    def _rounded(self, lengths_D: np.ndarray) -> np.ndarray:
        return -(-lengths_D // self._unit) * self._unit

    def _order_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in the order of the epoch, int64 [S]; begins of its groups and its end, relative to its begin)."""
        order = random_order(self._shards.num_shards, self._seed, named_stream("shards", self._name, epoch))
        ends = np.cumsum(self._shard_sizes_S[order])
        # The last group may have fewer shards; it ends with the last shard.
        group_ends = ends[self._group_shards - 1 :: self._group_shards]
        bounds = np.concatenate([[0], group_ends, ends[-1:]])
        return order, np.unique(bounds)

    def _shards_of(self, epoch: int, group: int) -> np.ndarray:
        return self._epoch(epoch)[0][group * self._group_shards : (group + 1) * self._group_shards]

    def _order_documents(self, epoch: int, group: int) -> tuple[np.ndarray, int]:
        bounds = self._epoch(epoch)[1]
        shards = self._shards_of(epoch, group)
        lengths = [self._shards.lengths(int(shard)) for shard in shards]
        documents = np.empty(sum(map(len, lengths)), DOCUMENT)
        documents["length"] = np.concatenate(lengths)
        documents["shard"] = np.repeat(shards, [len(part) for part in lengths])
        documents["index"] = np.concatenate([np.arange(len(part)) for part in lengths])
        stream = named_stream("documents", self._name, epoch, group)
        documents = documents[random_order(len(documents), self._seed, stream)]
        documents["size"] = self._rounded(documents["length"])
        ends = np.cumsum(documents["size"])
        documents["begin"] = epoch * self.epoch_size + bounds[group] + ends - documents["size"]
        return documents, int(epoch * self.epoch_size + bounds[group + 1])
