"""The thread that posts heartbeats and reads those of others. The tests wait for its actions, not for a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from sleeptrain.watch import heartbeat_thread as module
from sleeptrain.watch.heartbeat import Alarm, Heartbeat
from sleeptrain.watch.heartbeat_store import HeartbeatStore
from sleeptrain.watch.heartbeat_thread import HeartbeatThread
from sleeptrain.watch.progress import Location, Phase

LOST, FAILED = Alarm("lost", (1,), "rank 1 was lost"), Alarm("failed", (0,), "a mistake")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread exchanges only when a test wants it; a busy machine may take long."""
    monkeypatch.setattr(module, "INTERVAL", 600.0)
    monkeypatch.setattr(module, "PATIENCE", 600.0)


@pytest.fixture
def store() -> HeartbeatStore:
    made = HeartbeatStore(dist.HashStore(), 3)
    made.clear()
    return made


class Beats:
    """Counts the requests for heartbeats; the thread's owner sets `ended`."""

    def __init__(self) -> None:
        self.count, self.ended = 0, False

    def __call__(self) -> Heartbeat:
        self.count += 1
        return Heartbeat(self.count, 0, Location(1, Phase.FORWARD), ended=self.ended)


@pytest.fixture
def beats() -> Beats:
    return Beats()


@pytest.fixture
def thread(store: HeartbeatStore, beats: Beats) -> Iterator[HeartbeatThread]:
    """The thread of rank 0, which reads ranks 0 and 2."""
    made = HeartbeatThread(store, 0, 3, [0, 2], beats)
    yield made
    if made._thread.is_alive():
        made.stop()


def test_it_has_read_nothing_before_it_starts(thread: HeartbeatThread) -> None:
    assert thread.reading == (0, [None] * 3, None) and not thread.gone


def test_it_reads_only_its_ranks(store: HeartbeatStore, beats: Beats, thread: HeartbeatThread) -> None:
    for rank in (1, 2):
        store.post(rank, Heartbeat(9, 9, Location(None, Phase.STARTING)))
    beats.ended = True
    thread.start()
    thread.stop()
    own, unread, other = thread.reading.beats
    assert own is not None and own.ended and own.count == beats.count >= 1
    assert unread is None and other == Heartbeat(9, 9, Location(None, Phase.STARTING))
    assert thread.reading.number == beats.count


def test_an_alarm_is_raised_and_seen(store: HeartbeatStore, thread: HeartbeatThread) -> None:
    thread.start()
    assert thread.raise_alarm(FAILED) == FAILED
    assert store.read([0])[1] == FAILED


def test_of_two_alarms_the_first_one_counts(store: HeartbeatStore, thread: HeartbeatThread) -> None:
    store.raise_alarm(LOST)
    thread.start()
    assert thread.raise_alarm(FAILED) == LOST


def test_a_store_that_breaks_ends_it(
    store: HeartbeatStore, thread: HeartbeatThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise dist.DistNetworkError("connection reset by peer")

    monkeypatch.setattr(store, "post", broken)
    thread.start()
    thread.stop()
    assert thread.gone and thread.reading.number == 0


def test_where_the_store_does_not_answer_its_own_alarm_counts(
    store: HeartbeatStore, thread: HeartbeatThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    answers = threading.Event()
    monkeypatch.setattr(store, "post", lambda *_: answers.wait(600))
    thread.start()
    assert thread.raise_alarm(FAILED) == FAILED
    answers.set()


def test_its_last_beat_says_that_the_process_has_ended(
    store: HeartbeatStore, beats: Beats, thread: HeartbeatThread
) -> None:
    thread.start()
    thread.raise_alarm(FAILED)  # it has made an exchange
    beats.ended = True
    thread.stop()
    [last], _ = store.read([0])
    assert last is not None and last.ended
