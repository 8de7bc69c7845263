"""The forms of the output: lines for people, one line for a machine of a job, one JSON object for programs."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Sequence
from typing import Any

from sleeptrain.doctor.finding import FAILED, OK, SKIPPED, Result
from sleeptrain.terminal import shown

COLOURS = {OK: "32", FAILED: "31", SKIPPED: "2"}
MARKS = {OK: "ok", FAILED: "FAILED", SKIPPED: "-"}


def machine() -> str:
    """The name of this machine in Slurm, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def to_lines(result: Result, width: int, coloured: bool) -> str:
    """A result in one line, and its cure in a second. width: length of the longest name of a check."""
    finding = result.finding
    mark = MARKS[finding.state].ljust(6)
    if coloured:
        mark = f"\033[{COLOURS[finding.state]}m{mark}\033[0m"
    text = f"{result.name.ljust(width)}  {mark}  {one_line(finding.found)}"
    return text + (f"\n{' ' * width}  cure    {one_line(finding.cure)}" if finding.cure else "")


def summary(results: Sequence[Result], seconds: float) -> str:
    applied = [r for r in results if r.finding.state != SKIPPED]
    failures = [r.name for r in applied if r.finding.state == FAILED]
    counts = f"{len(applied)} checks, {seconds:.1f} s"
    return f"{len(failures)} of {counts}: {', '.join(failures)} failed" if failures else f"all good: {counts}"


def brief(results: Sequence[Result], seconds: float) -> str:
    """`node1: ok (14 checks, 6.2 s)`, or each failed check with its cure; always one line."""
    applied = [r for r in results if r.finding.state != SKIPPED]
    failures = [r for r in applied if r.finding.state == FAILED]
    if not failures:
        return f"{machine()}: ok ({len(applied)} checks, {seconds:.1f} s)"
    lines = [f"{r.name}: {'; '.join(filter(None, map(one_line, (r.finding.found, r.finding.cure))))}" for r in failures]
    return f"{machine()}: FAILED {' | '.join(lines)}"


def to_json(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    return {
        "machine": machine(),
        "system": platform.platform(),
        "ok": all(r.finding.state != FAILED for r in results),
        "seconds": seconds,
        "checks": [{"name": r.name, "seconds": r.seconds, **r.finding.to_json()} for r in results],
    }


def wants_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def one_line(text: str) -> str:
    return shown(" ".join(text.split()))
