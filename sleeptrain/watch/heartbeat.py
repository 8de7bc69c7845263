"""What the processes of a run tell each other about themselves: beats, and the alarm that ends them all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from sleeptrain.watch.progress import Location, Phase

# Seconds between the beats of a process.
INTERVAL = 1.0


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life.

    count: of the process's beats. moves: of its changes of place. long: it may stay there long. failing: an operation
    with another process has failed in it. ended: it is done, and no further beat follows.
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
    """Why a run ends before its time; the first one raised counts.

    kind: lost | stalled | failed. ranks: of whom it tells. code: the exit code of all.
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
