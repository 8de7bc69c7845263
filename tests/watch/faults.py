"""Runs in which something goes wrong on one rank, at one place of its step."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from sleeptrain.watch.whereabouts import Location, Phase, Whereabouts

# Long enough for a beat to be sent and read: the others know where the rank is before it is gone.
TOLD = 2.6


@dataclass(frozen=True)
class Fault:
    """rank: on whom. location: where. what: kill | stop | raise | loop | hold (for `seconds`, then go on)."""

    rank: int
    location: Location
    what: str
    seconds: float = 0.0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Fault:
        fields = json.loads(text)
        step, phase, *others = fields.pop("location")
        return Fault(location=Location(step, Phase(phase), *others), **fields)


def install(fault: Fault) -> None:
    """In this process, which knows its rank from the environment when it comes there."""
    move, struck = Whereabouts._move, list[bool]()

    def moved(self: Whereabouts, location: Location) -> None:
        move(self, location)
        if location == fault.location and int(os.environ["RANK"]) == fault.rank and not struck:
            struck.append(True)
            strike(fault)

    Whereabouts._move = moved  # type: ignore[method-assign]


def strike(fault: Fault) -> Any:
    if fault.what == "hold":
        return time.sleep(fault.seconds)
    if fault.what == "raise":
        raise ValueError("a mistake of this rank alone")
    if fault.what == "loop":
        while True:
            time.sleep(0.01)
    time.sleep(TOLD)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault.what])
    return None


if "SLEEPTRAIN_TEST_FAULT" in os.environ:  # a process that is started anew
    install(Fault.decode(os.environ["SLEEPTRAIN_TEST_FAULT"]))
