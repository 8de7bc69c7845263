"""The shards that are held open: the ones used last, and no more than the limits allow."""

from __future__ import annotations

import os

from sleeptrain.data.shard_open import OpenShard, OpenShards


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_what_another_thread_has_opened_is_taken() -> None:
    held, first, second = OpenShards(limit=2), OpenShard(b"a"), OpenShard(b"b")
    assert held.put(0, first) is first and held.put(0, second) is first and held.get(0) is first
    assert held.get(1) is None


def test_one_descriptor_stays_and_closes_with_its_shard() -> None:
    held, shard = OpenShards(limit=1), OpenShard(b"")
    one, other = (os.open(os.devnull, os.O_RDONLY) for _ in range(2))
    assert held.set_descriptor(shard, one) == held.set_descriptor(shard, other) == one
    assert is_open(one) and not is_open(other)
    held.put(0, shard)
    held.forget(0)
    assert is_open(one), "a thread may still read"
    del shard
    assert not is_open(one)


def test_the_shard_used_last_stays() -> None:
    held = OpenShards(limit=2)
    for number in (0, 1):
        held.put(number, OpenShard(bytes(16)))
    held.get(0)
    held.put(2, OpenShard(bytes(16)))
    assert [held.get(number) is not None for number in range(3)] == [True, False, True]


def test_held_records_are_bounded_by_size() -> None:
    held = OpenShards(limit=10, limit_bytes=100)
    for number in range(3):
        held.put(number, OpenShard(bytes(40)))
    assert [held.get(number) is not None for number in range(3)] == [False, True, True]
    held.forget(1)
    held.put(3, OpenShard(bytes(60)))
    assert [held.get(number) is not None for number in range(4)] == [False, False, True, True]
    held.put(4, OpenShard(bytes(1000)))  # one is always held
    assert [held.get(number) is not None for number in range(5)] == [False] * 4 + [True]
