"""The moment and the kind of a strike: drawn at random, by a generator that can be seeded again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterable
from typing import NamedTuple

from sleeptrain.watch.progress import Phase
from tests.parallel.processes import PATIENCE
from tests.torture.attempts import Attempt
from tests.torture.holds import CHANGE, Hold

STRIKES = ("kill one rank", "kill all ranks", "kill the starter", "SIGTERM", "stop, then kill one rank")
PHASES = (Phase.READING, Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE, Phase.EVALUATION, Phase.SAVING)
# Seconds: about how long a run takes to start, and how long a released rank goes on before a strike.
STARTS_IN, FURTHER = 2.5, 0.1
POLL = 0.002
# Seconds in which a run without a strike ends.
COMES_WITHIN = PATIENCE


class Plan(NamedTuple):
    """hold: where a rank halts; without one, the strike comes `delay` seconds after the start.

    released: whether the rank goes on for `delay` seconds before the strike. victim: the number of the struck rank.
    """

    strike: str
    hold: Hold | None
    released: bool
    delay: float
    victim: int


def draw(rng: random.Random, strike: str, size: int) -> Plan:
    """A fifth of the strikes hit the start, two fifths a phase of one of the next steps, two fifths a change of files.

    Rank 0, which completes checkpoints and keeps the records, makes most of the changes.
    """
    kind, rank, victim = (
        rng.choice(["start", "phase", "phase", CHANGE, CHANGE]),
        rng.randrange(size),
        rng.randrange(size),
    )
    if kind == "start":
        return Plan(strike, None, True, STARTS_IN * rng.random(), victim)
    if kind == "phase":
        hold = Hold(rank, rng.choice(PHASES), rng.randint(1, 4))
    elif rng.random() < 0.7:
        hold = Hold(0, CHANGE, rng.randint(1, 120))
    else:
        hold = Hold(rank, CHANGE, rng.randint(1, 8))
    return Plan(strike, hold, rng.random() < 0.4, FURTHER * rng.random(), victim)


def strike(attempt: Attempt, plan: Plan) -> str | None:
    """Strike at the planned moment. Return what the strike hit, or None if the run ended before."""
    held, where = _wait_for(attempt, plan)
    if not attempt.running:
        return None
    phase = attempt.signs.phase(plan.hold.rank if plan.hold else 0)
    hit = ("writing, " if attempt.signs.writing else "") + phase
    ranks = attempt.ranks()
    victim = ranks[plan.victim] if plan.victim < len(ranks) else attempt.starter.pid
    assert victim is not None and attempt.starter.pid is not None
    match plan.strike:
        case "kill one rank":
            _send([victim], signal.SIGKILL)
        case "kill all ranks":
            _send(ranks or [victim], signal.SIGKILL)
        case "kill the starter":
            _send([attempt.starter.pid], signal.SIGKILL)
        case "SIGTERM":
            _send([attempt.starter.pid], signal.SIGTERM)
        case "stop, then kill one rank":
            _send([victim], signal.SIGSTOP)
            time.sleep(5 * plan.delay)
            _send([victim], signal.SIGKILL)
    if held is not None:
        _send([held], signal.SIGCONT)
    return f"{hit}: {where}" if where.partition(" ")[0] not in PHASES else hit


def _wait_for(attempt: Attempt, plan: Plan) -> tuple[int | None, str]:
    """(the process that has halted and still does, the place of the halt)."""
    if plan.hold is None:
        attempt.starter.join(plan.delay)
        return None, "while it starts"
    until = time.monotonic() + COMES_WITHIN
    while attempt.running and attempt.halted is None:
        if time.monotonic() > until:
            attempt.kill()
            raise AssertionError(f"it stands still\n{attempt.log}")
        time.sleep(POLL)
    if (halted := attempt.halted) is None:
        return None, ""
    held, where = halted
    if plan.released:
        _send([held], signal.SIGCONT)
        attempt.starter.join(plan.delay)
        return None, f"after {where}"
    return held, where


def _send(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
