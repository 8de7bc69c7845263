"""Open shards: those used last stay open, and no more than the limits allow."""

from __future__ import annotations

import os

from sleeptrain.data.shard_open import OpenShard, OpenShards


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_a_shard_that_another_thread_has_opened_is_used() -> None:
    shards, first, second = OpenShards(limit=2), OpenShard(b"a"), OpenShard(b"b")
    assert shards.put(0, first) is first and shards.put(0, second) is first and shards.get(0) is first
    assert shards.get(1) is None


def test_one_descriptor_stays_and_closes_with_its_shard() -> None:
    shards, shard = OpenShards(limit=1), OpenShard(b"")
    one, other = (os.open(os.devnull, os.O_RDONLY) for _ in range(2))
    assert shards.set_descriptor(shard, one) == shards.set_descriptor(shard, other) == one
    assert is_open(one) and not is_open(other)
    shards.put(0, shard)
    shards.forget(0)
    assert is_open(one), "a thread may still read"
    del shard
    assert not is_open(one)


def test_the_shard_used_last_stays() -> None:
    shards = OpenShards(limit=2)
    for number in (0, 1):
        shards.put(number, OpenShard(bytes(16)))
    shards.get(0)
    shards.put(2, OpenShard(bytes(16)))
    assert [shards.get(number) is not None for number in range(3)] == [True, False, True]


def test_held_records_are_bounded_by_size() -> None:
    shards = OpenShards(limit=10, limit_bytes=100)
    for number in range(3):
        shards.put(number, OpenShard(bytes(40)))
    assert [shards.get(number) is not None for number in range(3)] == [False, True, True]
    shards.forget(1)
    shards.put(3, OpenShard(bytes(60)))
    assert [shards.get(number) is not None for number in range(4)] == [False, False, True, True]
    shards.put(4, OpenShard(bytes(1000)))  # one always stays
    assert [shards.get(number) is not None for number in range(5)] == [False] * 4 + [True]
