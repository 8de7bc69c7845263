"""A cache of the most recently used shards with their records, so that memory does not grow with the data."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

# Most systems allow 1,024 open files to a process; a batch of 64 rows that each read eight shards at a time takes half
# of them. Sidecars also have a size limit, because a shard may have few or millions of documents: this limit holds the
# sidecars of 512 shards of 64 MiB with documents of 1,000 tokens.
OPEN_SHARDS = 512
SIDECAR_BYTES = 256 * 2**20


class OpenShard:
    """The records of a shard's documents and, after the first read of a document, a descriptor of its tar file."""

    __slots__ = ("descriptor", "records")

    def __init__(self, records: bytes) -> None:
        self.records = records
        self.descriptor: int | None = None

    def __del__(self) -> None:
        # Closed only here, because a thread may still read from a shard that another thread has just evicted.
        if self.descriptor is not None:
            os.close(self.descriptor)


class OpenShards:
    """At most `limit` shards with at most `limit_bytes` bytes of records, or one larger shard. Thread-safe."""

    def __init__(self, limit: int, limit_bytes: int = SIDECAR_BYTES) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()  # the most recently used at the end
        self._lock = threading.Lock()

    def get(self, number: int) -> OpenShard | None:
        with self._lock:
            shard = self._shards.get(number)
            if shard is not None:
                self._shards.move_to_end(number)
            return shard

    def put(self, number: int, opened: OpenShard) -> OpenShard:
        """Add `opened` and return it. If another thread has added the shard already, return that one instead."""
        with self._lock:
            held = self._shards.setdefault(number, opened)
            if held is opened:
                self._bytes += len(opened.records)
            while len(self._shards) > 1 and (len(self._shards) > self._limit or self._bytes > self._limit_bytes):
                self._bytes -= len(self._shards.popitem(last=False)[1].records)
            return held

    def set_descriptor(self, opened: OpenShard, descriptor: int) -> int:
        """Set a shard's descriptor and return it. If another thread has set one, close `descriptor` and return that."""
        with self._lock:
            if opened.descriptor is None:
                opened.descriptor = descriptor
            else:
                os.close(descriptor)
            return opened.descriptor

    def forget(self, number: int) -> None:
        with self._lock:
            opened = self._shards.pop(number, None)
            if opened is not None:
                self._bytes -= len(opened.records)
