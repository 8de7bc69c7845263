"""Which ranks are lost and which stand still, from heartbeats alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sleeptrain.config.schema import HealthConfig
from sleeptrain.distributed.world import name_ranks
from sleeptrain.watch.failure_detector import FailureDetector
from sleeptrain.watch.heartbeat import Alarm, Heartbeat
from sleeptrain.watch.progress import Location, Phase

SETTINGS = HealthConfig(lost_after=30, stall_after=60, timeout=100)
FORWARD = Location(12, Phase.FORWARD, 3, 2)


class Three:
    """Three ranks; rank 0 looks at their heartbeats every `period` seconds."""

    def __init__(self, period: float = 1.0, sees_all: bool = True) -> None:
        self.detector = FailureDetector(SETTINGS, 3, [1, 2], sees_all)
        self.beats = [Heartbeat(1, 1, FORWARD) for _ in range(3)]
        self.period = period

    def run(self, seconds: float, silent: tuple[int, ...] = (), still: tuple[int, ...] = ()) -> Alarm | None:
        for _ in range(round(seconds / self.period)):
            self.beats = [
                b if rank in silent else replace(b, count=b.count + 1, moves=b.moves + (rank not in still))
                for rank, b in enumerate(self.beats)
            ]
            if alarm := self.detector.look(self.beats, self.period):
                return alarm
        return None

    def change(self, rank: int, **fields: object) -> None:
        self.beats[rank] = replace(self.beats[rank], **fields)  # type: ignore[arg-type]


def test_a_rank_without_beats_is_lost_at_its_time() -> None:
    three = Three()
    assert three.run(100) is None
    assert three.run(29, silent=(2,)) is None
    assert three.run(1, silent=(2,)) == Alarm(
        "lost", (2,), "rank 2 was lost at step 12, window 3, pass 2, forward (last heard of 30 s ago)"
    )


def test_a_rank_that_beats_again_is_not_lost() -> None:
    three = Three()
    for _ in range(5):
        assert three.run(25, silent=(1, 2)) is None
        assert three.run(1) is None


def test_after_a_failed_operation_the_lost_rank_is_named_soon() -> None:
    three = Three()
    three.run(3)
    three.change(0, failing=True)
    alarm = three.run(6, silent=(1,))
    assert alarm is not None and alarm.ranks == (1,)
    three = Three()
    three.change(0, failing=True)
    assert three.run(100, still=(0,)) is None, "who beats is not lost"


def test_late_looks_find_no_rank_lost() -> None:
    """The looking rank was paused, and sees the newest heartbeats of the others a little later than its own."""
    three = Three(period=500.0)
    three.run(500)
    assert three.run(500 * 10, silent=(1, 2)) is None
    assert three.run(500 * 10, silent=(1, 2)) is not None, "ten more looks are 20 s more"


def test_a_rank_that_has_ended_is_not_lost() -> None:
    three = Three()
    three.run(3)
    three.change(1, ended=True)
    assert three.run(200, silent=(1,)) is None


def test_all_must_stand_still() -> None:
    three = Three()
    assert three.run(200, still=(1, 2)) is None, "the one that moves is what the others wait for"
    three.change(2, location=Location(12, Phase.BACKWARD, 3, 2))
    three.run(1)
    assert three.run(59, still=(0, 1, 2)) is None
    alarm = three.run(2, still=(0, 1, 2))
    assert alarm == Alarm(
        "stalled",
        (0, 1, 2),
        "no progress for 60 s: ranks 0-1 at step 12, window 3, pass 2, forward; "
        "rank 2 at step 12, window 3, pass 2, backward",
    )


def test_a_silent_rank_is_lost_and_not_still() -> None:
    three = Three()
    three.run(3)
    assert three.run(50, still=(0, 1, 2)) is None
    alarm = three.run(31, still=(0, 1, 2), silent=(1,))
    assert alarm is not None and (alarm.kind, alarm.ranks) == ("lost", (1,))
    three = Three()
    three.run(3)
    three.change(1, failing=True)
    assert three.run(200, still=(0, 1, 2)) is None, "who is lost will be known soon"


def test_a_long_phase_of_one_gives_all_more_time() -> None:
    three = Three()
    three.run(3)
    three.change(0, location=Location(12, Phase.SAVING), long=True)
    assert three.run(89, still=(0, 1, 2)) is None
    three.change(0, long=False)
    assert three.run(30, still=(1, 2)) is None, "it moves, and the others will"
    three.change(0, long=True)
    assert three.run(89, still=(0, 1, 2)) is None
    alarm = three.run(3, still=(0, 1, 2))
    assert alarm is not None and alarm.kind == "stalled"


@pytest.mark.parametrize("settings", [replace(SETTINGS, stall_after=0), SETTINGS])
def test_a_standstill_is_reported_only_if_set_and_by_the_rank_that_sees_all(settings: HealthConfig) -> None:
    detector = FailureDetector(settings, 1, [], sees_all=settings.stall_after == 0)
    for count in range(500):
        assert detector.look([Heartbeat(count, 1, FORWARD)], 1.0) is None


def test_ranks_in_words() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([5, 0, 2, 3, 4, 9]) == "ranks 0, 2-5, 9"
