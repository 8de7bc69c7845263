"""Who is lost and who stands still: a pure function of the beats that were seen, and of the time they were looked at.

Silence is counted in time of looking: a look that comes late, since the machine is busy or was asleep, counts as one
that came a little late. So a process that was held up itself does not take the others for lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.config.schema import HealthConfig
from sleeptrain.distributed.world import name_ranks
from sleeptrain.watch.heartbeat import INTERVAL, Alarm, Heartbeat, where

# Seconds of silence after which a rank is lost where an operation with it has failed already.
SUSPECTED = 5.0
# The share of `health.timeout` that phases may take which show no progress: torch's own timeout comes later.
LONG_SHARE = 0.9


class FailureDetector:
    """Looks at the beats of `size` ranks.

    judged: those that may be found lost. sees_all: every rank's beats are read, so that a standstill can be told.
    """

    def __init__(self, settings: HealthConfig, size: int, judged: Sequence[int], sees_all: bool) -> None:
        self._settings = settings
        self._judged = judged
        self._sees_all = sees_all
        self._last: list[Heartbeat | None] = [None] * size
        self._silent = [0.0] * size  # seconds since the last beat
        self._still = [0.0] * size  # seconds since the last move

    def look(self, beats: Sequence[Heartbeat | None], seconds: float) -> Alarm | None:
        """beats: the newest of each rank, None of one that was not read. seconds: since the last look."""
        seconds = min(seconds, 2 * INTERVAL)
        for rank, (beat, before) in enumerate(zip(beats, self._last, strict=True)):
            moved = beat is not None and (before is None or beat.moves != before.moves)
            beaten = beat is not None and (before is None or beat.count != before.count)
            self._still[rank] = 0.0 if moved else self._still[rank] + seconds
            self._silent[rank] = 0.0 if beaten else self._silent[rank] + seconds
            self._last[rank] = beat or before
        return self._lost() or self._stalled()

    @property
    def _failing(self) -> bool:
        """Whether an operation with another rank has failed somewhere."""
        return any(beat is not None and beat.failing for beat in self._last)

    def _lost(self) -> Alarm | None:
        limit = min(self._settings.lost_after, SUSPECTED) if self._failing else self._settings.lost_after
        lost = [r for r in self._judged if self._silent[r] >= limit and not self._has_ended(r)]
        if not lost:
            return None
        places = [f"rank {r} was lost {where(self._last[r])} (last heard of {self._silent[r]:.0f} s ago)" for r in lost]
        return Alarm("lost", tuple(lost), "; ".join(places))

    def _stalled(self) -> Alarm | None:
        """Where one rank stands still all do before long; one that moves may be what the others wait for."""
        running = [r for r, beat in enumerate(self._last) if beat is not None and not beat.ended]
        if not self._sees_all or not running or not self._settings.stall_after:
            return None
        if any(self._silent[r] > 2 * INTERVAL for r in running) or self._failing:
            return None  # who is lost is the question then
        long = any(beat is not None and beat.long and not beat.ended for beat in self._last)
        limit = LONG_SHARE * self._settings.timeout if long else self._settings.stall_after
        if min(self._still[r] for r in running) < limit:
            return None
        still = min(self._still[r] for r in running)
        return Alarm("stalled", tuple(running), f"no progress for {still:.0f} s: {self._places(running)}")

    def _places(self, ranks: Sequence[int]) -> str:
        """Where ranks are, those in one place together."""
        together: dict[str, list[int]] = {}
        for rank in ranks:
            together.setdefault(where(self._last[rank]), []).append(rank)
        return "; ".join(f"{name_ranks(those)} {place}" for place, those in together.items())

    def last(self, rank: int) -> Heartbeat | None:
        return self._last[rank]

    def _has_ended(self, rank: int) -> bool:
        beat = self._last[rank]
        return beat is not None and beat.ended
