"""Whether a run stops before its end: at a signal to any of its processes, or because its time is nearly over.

All processes count the time by one clock. What is left when they have met is agreed upon; from then on each counts by
its monotonic clock, which no correction of the date changes.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence

from sleeptrain.config.duration import parse_duration
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError
from sleeptrain.stop import StopRequest
from sleeptrain.train.logging.progress_line import duration_text

# What is kept free at the end: MARGIN times the longest step and save so far, and LAST_SECONDS for the
# logs and the interpreter to close.
MARGIN, LAST_SECONDS = 1.5, 5.0
# Seconds by which a clock may be off before a run warns. They are read within a moment, but on a busy machine that may
# take a second or two.
SKEW = 10.0


class Stopping:
    """Looked at between steps and between held-out batches by all processes together, which also make it together.

    reason: why the run stops, the same in all processes; None until then. save_needs: seconds to keep free for the last
    checkpoint. skew: a line on the processes' clocks where these differ, in all processes.
    """

    def __init__(self, max_time: str | None, request: StopRequest, world: World) -> None:
        self._request, self._world = request, world
        date, self.skew = _date(world)
        ran = time.monotonic() - request.began
        left = world.all_or_raise(lambda: seconds_left(max_time, ran, date, os.environ))[0]
        self._deadline = None if left is None else time.monotonic() + left
        self._looked: float | None = None
        self._longest_step = self.save_needs = 0.0
        self.reason: str | None = None

    def asked(self) -> bool:
        """Whether this process would stop."""
        return self._request.requested or self._over()

    def agreed(self) -> bool:
        """Whether some process would stop, in all of them. The time between two looks is taken for that of a step."""
        now = time.monotonic()
        if self._looked is not None:
            self._longest_step = max(self._longest_step, now - self._looked)
        self._looked = now
        if self.reason is None and self._world.any(self.asked()):
            reasons = self._world.gather(self._own_reason())
            self.reason = next(reason for reason in reasons if reason is not None)
        return self.reason is not None

    def start(self) -> None:
        """The steps begin: loading what they need was none of them."""
        self._looked = None

    def limit_line(self) -> str | None:
        """What a run says of its time limit when it begins."""
        if self._deadline is None:
            return None
        left = duration_text(max(self._deadline - time.monotonic(), 0))
        return f"time limit in {left}: stops before, so that a step and a save still fit, with exit code 75"

    def _over(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline - self._reserve()

    def _reserve(self) -> float:
        return MARGIN * (self._longest_step + self.save_needs) + LAST_SECONDS

    def _own_reason(self) -> str | None:
        if self._request.requested:
            where = "" if self._world.is_main else f" to rank {self._world.rank}"
            return f"{self._request.signal_name}{where}"
        if not self._over():
            return None
        return (
            f"time limit ({self._reserve():.0f} s kept free: the longest step so far took {self._longest_step:.1f} s, "
            f"the last save may take {self.save_needs:.1f} s)"
        )


def seconds_left(max_time: str | None, ran: float, date: float, environment: Mapping[str, str]) -> float | None:
    """Seconds in which a run must have ended that has run for `ran` seconds; None: any number.

    max_time: `train.max_time`; `auto` is the end of the Slurm job, where Slurm tells it. date: Unix seconds. Raises
    ConfigError where what Slurm tells is no time.
    """
    if max_time is None:
        return None
    if max_time != "auto":
        return parse_duration(max_time) - ran
    end = environment.get("SLURM_JOB_END_TIME")
    if not end:
        return None
    try:
        return float(end) - date
    except ValueError:
        raise ConfigError(f"SLURM_JOB_END_TIME={end} is no Unix time: unset it, or set train.max_time") from None


def _date(world: World) -> tuple[float, str | None]:
    """The date that counts, the median of all processes' (Unix seconds), and a line where some differ from it."""
    world.any(False)  # they come one after the other, and leave together
    found = world.gather((socket.gethostname(), time.time()))
    date = statistics.median_low([clock for _, clock in found])
    return date, skew_line(found, date)


def skew_line(found: Sequence[tuple[str, float]], date: float) -> str | None:
    """What is said of clocks that are far from the date; None where none is. found: host and clock, by rank.

    Of a host one process is named.
    """
    far: dict[str, str] = {}
    for rank, (host, clock) in enumerate(found):
        if abs(clock - date) > SKEW:
            far.setdefault(host, f"that of rank {rank} on {host} is {clock - date:+.0f} s off")
    if not far:
        return None
    return (
        f"clocks differ: {', '.join(far.values())}; the end of a Slurm job is counted by the median of all. "
        "Set them (chrony, ntpd): dates in records and logs are wrong"
    )
