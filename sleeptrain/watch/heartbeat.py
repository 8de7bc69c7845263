"""Messages between the processes of a run: heartbeats, and the alarm that ends all processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sleeptrain.watch.progress import Location, Phase

# Seconds between the heartbeats of a process.
INTERVAL = 1.0


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life of a process.

    count: heartbeats of the process so far.
    moves: changes of its location so far.
    location: where it is now.
    long: it may stay there for long.
    failing: an operation with another process has failed in it.
    ended: it is done; no further heartbeat follows.
    """

    count: int
    moves: int
    location: Location
    long: bool = False
    failing: bool = False
    ended: bool = False

    def encode(self) -> str:
        return json.dumps(asdict(self) | {"location": list(self.location)})

    @staticmethod
    def decode(text: str) -> Heartbeat:
        fields = json.loads(text)
        step, phase, window, pass_index = fields.pop("location")
        return Heartbeat(location=Location(step, Phase(phase), window, pass_index), **fields)


@dataclass(frozen=True)
class Alarm:
    """The reason why a run ends early. Only the first alarm of a run counts.

    kind: `lost`, `stalled` or `failed`.
    ranks: the ranks that are lost, stand still or failed.
    text: a message for the user.
    code: the exit code of all processes.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str
    code: int = 1

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Alarm:
        fields = json.loads(text)
        return Alarm(ranks=tuple(fields.pop("ranks")), **fields)


def where(beat: Heartbeat | None) -> str:
    return f"at {beat.location}" if beat is not None else "before its first sign of life"
