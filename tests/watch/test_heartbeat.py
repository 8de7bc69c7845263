"""Messages between the processes of a run: one process reads what another writes."""

from __future__ import annotations

from dataclasses import replace

from sleeptrain.watch.heartbeat import Alarm, Heartbeat, where
from sleeptrain.watch.progress import Location, Phase

FORWARD = Location(12, Phase.FORWARD, 3, 2)


def test_heartbeats_and_alarms_keep_their_fields() -> None:
    beat = Heartbeat(3, 7, Location(12, Phase.LOCATING), long=True, failing=True, ended=True)
    assert Heartbeat.decode(beat.encode()) == beat
    assert Heartbeat.decode(replace(beat, location=FORWARD).encode()).location == FORWARD
    alarm = Alarm("failed", (1, 2), "über", 2)
    assert Alarm.decode(alarm.encode()) == alarm


def test_where_a_process_was_in_words() -> None:
    assert where(Heartbeat(3, 7, FORWARD)) == "at step 12, window 3, pass 2, forward"
    assert where(Heartbeat(1, 0, Location(None, Phase.STARTING))) == "at the start"
    assert where(None) == "before its first sign of life"
