"""Early stop of a run: after a signal to any of its processes, or shortly before its time limit.

When the processes have met, they agree on the remaining time. From then on each counts by its monotonic clock, which
does not change when the system clock is set.
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

# The time reserved before the limit is MARGIN times the longest step plus save so far, plus LAST_SECONDS, in which the
# logs and the interpreter close.
MARGIN, LAST_SECONDS = 1.5, 5.0
# Seconds by which a clock may be off without a warning. Reading all clocks on a busy machine may take a second or two.
SKEW = 10.0


class Stopping:
    """Decides when the run stops early. All processes create it together.

    Before each step, in an exchange with other values, all processes call `step_begins` and `heed` together; between
    held-out batches `agreed`.
    reason: why the run stops, equal in all processes; None as long as it goes on.
    save_needs: seconds to reserve for the last checkpoint.
    skew: a warning if the processes' clocks differ, equal in all processes; else None.
    """

    def __init__(self, max_time: str | None, request: StopRequest, world: World) -> None:
        self._request, self._world = request, world
        date, self.skew = _date(world)
        elapsed = time.monotonic() - request.began
        remaining = world.all_or_raise(lambda: seconds_left(max_time, elapsed, date, os.environ))[0]
        self._deadline = None if remaining is None else time.monotonic() + remaining
        self._last_check: float | None = None
        self._longest_step = self.save_needs = 0.0
        self.reason: str | None = None

    def stop_requested(self) -> bool:
        """True if this process is to stop: after a signal, or near the time limit."""
        return self._request.requested or self._over()

    def step_begins(self) -> bool:
        """True if this process is to stop. The time between two calls counts as that of a step."""
        now = time.monotonic()
        if self._last_check is not None:
            self._longest_step = max(self._longest_step, now - self._last_check)
        self._last_check = now
        return self.stop_requested()

    def heed(self, some: bool) -> bool:
        """True if the run stops. some: some process is to stop, the same in all; they agree on the reason."""
        if some and self.reason is None:
            reasons = self._world.gather(self._local_reason())
            self.reason = next(reason for reason in reasons if reason is not None)
        return self.reason is not None

    def agreed(self) -> bool:
        """True in all processes if some process is to stop; they exchange it here. It counts as `step_begins`."""
        wants = self.step_begins()
        return self.reason is not None or self.heed(self._world.any(wants))

    def start(self) -> None:
        """Call it when the steps begin: the time of loading then does not count as a step."""
        self._last_check = None

    def limit_line(self) -> str | None:
        """The line on the time limit for the start of the run; None without a limit."""
        if self._deadline is None:
            return None
        remaining = duration_text(max(self._deadline - time.monotonic(), 0))
        return f"time limit in {remaining}: stops before, so that a step and a save still fit, with exit code 75"

    def _over(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline - self._reserve()

    def _reserve(self) -> float:
        return MARGIN * (self._longest_step + self.save_needs) + LAST_SECONDS

    def _local_reason(self) -> str | None:
        if self._request.requested:
            where = "" if self._world.is_main else f" to rank {self._world.rank}"
            return f"{self._request.signal_name}{where}"
        if not self._over():
            return None
        return (
            f"time limit ({self._reserve():.0f} s kept free: the longest step so far took {self._longest_step:.1f} s, "
            f"the last save may take {self.save_needs:.1f} s)"
        )


def seconds_left(max_time: str | None, elapsed: float, date: float, environment: Mapping[str, str]) -> float | None:
    """The seconds until a run must have ended; None without a limit.

    max_time: `train.max_time`; `auto` is the end of the Slurm job, if SLURM_JOB_END_TIME is set.
    elapsed: seconds that the run has taken so far. date: the current time, Unix seconds.
    Raises ConfigError if SLURM_JOB_END_TIME is no number.
    """
    if max_time is None:
        return None
    if max_time != "auto":
        return parse_duration(max_time) - elapsed
    end = environment.get("SLURM_JOB_END_TIME")
    if not end:
        return None
    try:
        return float(end) - date
    except ValueError:
        raise ConfigError(f"SLURM_JOB_END_TIME={end} is no Unix time: unset it, or set train.max_time") from None


def _date(world: World) -> tuple[float, str | None]:
    """The median of all processes' clocks (Unix seconds), and a warning if some clocks differ from it."""
    world.any(False)  # a barrier: the processes read their clocks at the same time
    clocks = world.gather((socket.gethostname(), time.time()))
    date = statistics.median_low([clock for _, clock in clocks])
    return date, skew_line(clocks, date)


def skew_line(clocks: Sequence[tuple[str, float]], date: float) -> str | None:
    """A warning if clocks differ from the date by more than SKEW; else None. It names one process of each host.

    clocks: (host, Unix seconds), by rank.
    """
    outliers: dict[str, str] = {}
    for rank, (host, clock) in enumerate(clocks):
        if abs(clock - date) > SKEW:
            outliers.setdefault(host, f"that of rank {rank} on {host} is {clock - date:+.0f} s off")
    if not outliers:
        return None
    return (
        f"clocks differ: {', '.join(outliers.values())}; the end of a Slurm job is counted by the median of all. "
        "Set them (chrony, ntpd): dates in records and logs are wrong"
    )
