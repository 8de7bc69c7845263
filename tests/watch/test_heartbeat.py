"""Messages between the processes of a run: what one writes, another one reads."""

from __future__ import annotations

from dataclasses import replace

from sleeptrain.watch.heartbeat import Alarm, Heartbeat
from sleeptrain.watch.progress import Location, Phase

FORWARD = Location(12, Phase.FORWARD, 3, 2)


def test_beats_and_alarms_keep_what_they_say() -> None:
    beat = Heartbeat(3, 7, Location(12, Phase.LOCATING), long=True, failing=True, ended=True)
    assert Heartbeat.decode(beat.encode()) == beat
    assert Heartbeat.decode(replace(beat, location=FORWARD).encode()).location == FORWARD
    alarm = Alarm("failed", (1, 2), "über", 2)
    assert Alarm.decode(alarm.encode()) == alarm
