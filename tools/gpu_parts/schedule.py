"""Run the parts one after another, each in a process of its own that is killed when its time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import Part

# Called with a part, its seconds and the file of its outcome: the command line of its process.
Command = Callable[[Part, float, Path], list[str]]

LEAST = 5.0  # seconds: no part is started with less


def run_parts(
    parts: Sequence[Part], command: Command, folder: Path, seconds: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The outcome of each part (docs/gpu.md): name, status, reason, seconds, budget, result.

    A part has its own seconds and what the parts before it did not use; later parts keep theirs.
    """
    end, outcomes = time.monotonic() + seconds, []
    for i, part in enumerate(parts):
        remaining = end - time.monotonic()
        budget = min(remaining, max(remaining - sum(p.seconds for p in parts[i + 1 :]), part.seconds))
        if budget < LEAST:
            outcome = {"status": "not run", "reason": "the time was up", "seconds": 0.0, "result": {}}
        else:
            tell(f"{part.name}: at most {budget:.0f} s")
            outcome = _run(part, command, folder, budget)
            tell(f"{part.name}: {outcome['status']}, {outcome['seconds']:.0f} s {outcome['reason']}".rstrip())
        outcomes.append({"name": part.name, **outcome, "budget": round(max(budget, 0.0), 1)})
    return outcomes


def _run(part: Part, command: Command, folder: Path, budget: float) -> dict[str, Any]:
    name = part.name.replace(" ", "-").replace("'", "")
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    file.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("wb") as output:
        # Its own session: what it starts is killed with it.
        process = subprocess.Popen(
            command(part, budget, file), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(budget)
        except subprocess.TimeoutExpired:
            pass
        finally:
            killed = process.poll() is None
            _kill(process)
    outcome = _read(file)
    outcome["seconds"] = round(time.monotonic() - start, 1)
    if outcome["status"] == "running":
        outcome["status"] = "cut" if killed else "failed"
        ended = f"it was killed after {budget:.0f} s" if killed else f"its process ended with {process.returncode}"
        outcome["reason"] = f"{ended}; {log.name} ends: {_last_line(log)}"
    return outcome


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"status": "running", "reason": "", "result": {}}
    outcome: dict[str, Any] = json.loads(file.read_text())
    return outcome


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "(empty)"
