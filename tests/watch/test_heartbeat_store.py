"""Heartbeats and the alarm in a store that all processes read."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.watch.heartbeat import Alarm, Heartbeat
from sleeptrain.watch.heartbeat_store import HeartbeatStore, open_store
from sleeptrain.watch.progress import Location, Phase

LOST = Alarm("lost", (1,), "rank 1 was lost")


def beat(count: int) -> Heartbeat:
    return Heartbeat(count, 0, Location(1, Phase.FORWARD, 1, 1))


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_posted_heartbeats_are_read_by_rank(store: dist.Store) -> None:
    one, other = HeartbeatStore(store, 3), HeartbeatStore(store, 3)
    one.clear()
    assert other.read([0, 1, 2]) == ([None, None, None], None)
    one.post(2, beat(1))
    one.post(2, beat(2))
    other.post(0, beat(5))
    assert other.read([2, 1, 0]) == ([beat(2), None, beat(5)], None)
    assert one.read([]) == ([], None)


def test_the_first_alarm_counts(store: dist.Store) -> None:
    beats = HeartbeatStore(store, 2)
    beats.clear()
    assert beats.raise_alarm(LOST) == LOST
    assert beats.raise_alarm(Alarm("failed", (0,), "another")) == LOST
    assert beats.read([0]) == ([None], LOST)


def test_keys_exist_when_the_store_is_clear(store: dist.Store) -> None:
    beats = HeartbeatStore(store, 1)
    assert not beats.is_clear
    beats.clear()
    assert beats.is_clear


def test_an_alarm_outlives_a_late_clear_but_not_the_run(store: dist.Store) -> None:
    first, second = HeartbeatStore(store, 1, run=1), HeartbeatStore(store, 1, run=2)
    first.clear()
    first.raise_alarm(LOST)
    first.clear()
    assert first.read([0])[1] == LOST
    second.clear()
    assert second.read([0]) == ([None], None)


def test_a_run_of_one_process_has_none() -> None:
    assert open_store(World(Mesh.single(), torch.device("cpu"))) is None
