"""The thread that reads and writes the heartbeat store. No other thread waits for a store that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sleeptrain.watch.heartbeat import INTERVAL, Alarm, Heartbeat
from sleeptrain.watch.heartbeat_store import HeartbeatStore

# Seconds that another thread waits until this one has raised an alarm or stopped.
PATIENCE = 3.0


class Reading(NamedTuple):
    """The content of the store.

    number: of the reading, from 1; 0 before the first. beats: newest heartbeat by rank, None if not read.
    """

    number: int
    beats: Sequence[Heartbeat | None]
    alarm: Alarm | None


class HeartbeatThread:
    """Posts this process's heartbeat once a second, and reads the alarm and the heartbeats of `ranks`.

    reading: the last one. gone: the connection to the store has broken.
    """

    def __init__(
        self, store: HeartbeatStore, rank: int, size: int, ranks: Sequence[int], beat: Callable[[], Heartbeat]
    ) -> None:
        self._store, self._rank, self._size, self._ranks, self._beat = store, rank, size, ranks, beat
        self.reading = Reading(0, [None] * size, None)
        self.gone = False
        self._to_raise: Alarm | None = None
        self._ending, self._wake, self._alarmed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-exchange", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        """Read and write the store now."""
        self._wake.set()

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """Raise `alarm`, and return the alarm that counts: the first one, or `alarm` if the store does not answer."""
        self._to_raise = alarm
        self.hurry()
        self._alarmed.wait(PATIENCE)
        return self.reading.alarm or alarm

    def stop(self) -> None:
        """Post a last heartbeat, which says that this process has ended, and stop."""
        self._ending.set()
        self.hurry()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                self._exchange()
                self._wake.wait(INTERVAL)
                self._wake.clear()
            self._exchange()
        except RuntimeError:  # of the store, such as dist.DistError
            self.gone = True

    def _exchange(self) -> None:
        self._store.post(self._rank, self._beat())
        if self._to_raise is not None:
            self._store.raise_alarm(self._to_raise)
            self._to_raise = None
        beats: list[Heartbeat | None] = [None] * self._size
        read, alarm = self._store.read(self._ranks)
        for rank, beat in zip(self._ranks, read, strict=True):
            beats[rank] = beat
        self.reading = Reading(self.reading.number + 1, beats, alarm)
        if alarm is not None:
            self._alarmed.set()
