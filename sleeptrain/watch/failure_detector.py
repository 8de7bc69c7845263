"""Detect ranks that are lost or make no progress: a pure function of heartbeats and of the times when they were read.

The time between two looks counts as at most two heartbeat intervals, even if a busy or suspended machine delays the
second look. So a process that was delayed itself does not report the others as lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.config.schema import HealthConfig
from sleeptrain.distributed.world import name_ranks
from sleeptrain.watch.heartbeat import INTERVAL, Alarm, Heartbeat, where

# Seconds of silence after which a rank is lost if an operation with another rank has already failed somewhere.
SUSPECTED = 5.0
# Phases without signs of progress may take this share of `health.timeout`: torch's own timeout comes later.
LONG_SHARE = 0.9


class FailureDetector:
    """Judges the heartbeats of `size` ranks.

    watched: the ranks that it may report as lost. sees_all: it gets the heartbeats of all ranks, and so can detect that
    all stand still.
    """

    def __init__(self, settings: HealthConfig, size: int, watched: Sequence[int], sees_all: bool) -> None:
        self._settings = settings
        self._watched = watched
        self._sees_all = sees_all
        self._last: list[Heartbeat | None] = [None] * size
        self._silent = [0.0] * size  # seconds since the last heartbeat
        self._still = [0.0] * size  # seconds since the last progress

    def look(self, beats: Sequence[Heartbeat | None], seconds: float) -> Alarm | None:
        """Return an alarm if a rank is lost or all stand still.

        beats: the newest heartbeat of each rank, None if it was not read. seconds: since the last look.
        """
        seconds = min(seconds, 2 * INTERVAL)
        for rank, (beat, previous) in enumerate(zip(beats, self._last, strict=True)):
            moved = beat is not None and (previous is None or beat.moves != previous.moves)
            is_new = beat is not None and (previous is None or beat.count != previous.count)
            self._still[rank] = 0.0 if moved else self._still[rank] + seconds
            self._silent[rank] = 0.0 if is_new else self._silent[rank] + seconds
            self._last[rank] = beat or previous
        return self._lost() or self._stalled()

    @property
    def _failing(self) -> bool:
        """True if an operation with another rank has failed on some rank."""
        return any(beat is not None and beat.failing for beat in self._last)

    def _lost(self) -> Alarm | None:
        limit = min(self._settings.lost_after, SUSPECTED) if self._failing else self._settings.lost_after
        lost = [r for r in self._watched if self._silent[r] >= limit and not self._has_ended(r)]
        if not lost:
            return None
        places = [f"rank {r} was lost {where(self._last[r])} (last heard of {self._silent[r]:.0f} s ago)" for r in lost]
        return Alarm("lost", tuple(lost), "; ".join(places))

    def _stalled(self) -> Alarm | None:
        """An alarm if no rank makes progress. As long as one does, the others may be waiting for it."""
        running = [r for r, beat in enumerate(self._last) if beat is not None and not beat.ended]
        if not self._sees_all or not running or not self._settings.stall_after:
            return None
        if any(self._silent[r] > 2 * INTERVAL for r in running) or self._failing:
            return None  # a rank may be lost instead
        long = any(beat is not None and beat.long and not beat.ended for beat in self._last)
        limit = LONG_SHARE * self._settings.timeout if long else self._settings.stall_after
        if min(self._still[r] for r in running) < limit:
            return None
        still = min(self._still[r] for r in running)
        return Alarm("stalled", tuple(running), f"no progress for {still:.0f} s: {self._places(running)}")

    def _places(self, ranks: Sequence[int]) -> str:
        """The places of ranks in words, with the ranks that share a place grouped."""
        groups: dict[str, list[int]] = {}
        for rank in ranks:
            groups.setdefault(where(self._last[rank]), []).append(rank)
        return "; ".join(f"{name_ranks(group)} {place}" for place, group in groups.items())

    def last(self, rank: int) -> Heartbeat | None:
        return self._last[rank]

    def _has_ended(self, rank: int) -> bool:
        beat = self._last[rank]
        return beat is not None and beat.ended
