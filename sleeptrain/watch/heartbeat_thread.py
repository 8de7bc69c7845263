"""The thread that speaks with the board, so that nobody else waits for a store that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sleeptrain.watch.heartbeat import INTERVAL, Alarm, Heartbeat
from sleeptrain.watch.heartbeat_store import HeartbeatStore

# Seconds that others wait for the thread to do what it was asked.
PATIENCE = 3.0


class Seen(NamedTuple):
    """What was read last. readings: so far. beats: by rank, None of those that are not read."""

    readings: int
    beats: Sequence[Heartbeat | None]
    alarm: Alarm | None


class Exchange:
    """Posts this process's beat once a second, and reads those of `ranks` and the alarm.

    seen: what was read last. gone: the connection to the store has broken.
    """

    def __init__(
        self, board: HeartbeatStore, rank: int, size: int, ranks: Sequence[int], beat: Callable[[], Heartbeat]
    ) -> None:
        self._board, self._rank, self._size, self._ranks, self._beat = board, rank, size, ranks, beat
        self.seen = Seen(0, [None] * size, None)
        self.gone = False
        self._wanted: Alarm | None = None
        self._ending, self._wake, self._alarmed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-exchange", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        """Speak with the board now."""
        self._wake.set()

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """The alarm that counts: this one, if it is the first. Without an answer of the store, this one too."""
        self._wanted = alarm
        self.hurry()
        self._alarmed.wait(PATIENCE)
        return self.seen.alarm or alarm

    def stop(self) -> None:
        """Posts the last beat, that this process has ended, and no other."""
        self._ending.set()
        self.hurry()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        # The store's own error; a thread that dies of it is told by `gone`.
        try:
            while not self._ending.is_set():
                self._speak()
                self._wake.wait(INTERVAL)
                self._wake.clear()
            self._speak()
        except RuntimeError:
            self.gone = True

    def _speak(self) -> None:
        self._board.post(self._rank, self._beat())
        if self._wanted is not None:
            self._board.raise_alarm(self._wanted)
            self._wanted = None
        beats: list[Heartbeat | None] = [None] * self._size
        read, alarm = self._board.read(self._ranks)
        for rank, beat in zip(self._ranks, read, strict=True):
            beats[rank] = beat
        self.seen = Seen(self.seen.readings + 1, beats, alarm)
        if alarm is not None:
            self._alarmed.set()
