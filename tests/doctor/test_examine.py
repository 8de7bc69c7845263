"""One process for each check or GPU, and none left when the examination ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.doctor.checks import CHECKS, OF_RANKS, OF_TEXT, ON_DEVICE
from sleeptrain.doctor.examine import examine
from sleeptrain.doctor.finding import ok
from tests.doctor.cases import alone, assert_ended, found, hangs

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_there_is_a_process_for_each_gpu(tmp_path: Path, script: Callable[..., None]) -> None:
    script(torch=lambda case: ok("", devices=3), collective=lambda case: ok(f"{case.rank} of {case.size}"))
    assert found(["torch", "collective"], tmp_path)["collective"].found == "0 of 3"


def test_one_that_stops_listening_leaves_no_process(tmp_path: Path, script: Callable[..., None]) -> None:
    script(data=hangs)
    results = examine(["python", "data"], alone(tmp_path))
    assert next(results).name == "python"
    results.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_doctor_that_is_ended_takes_its_processes_along(tmp_path: Path, number: signal.Signals) -> None:
    """A process that hangs in each of them writes down which it is."""
    code = f"""
import os, signal, sys
from pathlib import Path
from sleeptrain.cli import main
from sleeptrain.doctor.checks import CHECKS
from tests.doctor.cases import hangs, scripted

def noted(case):
    Path({str(tmp_path)!r}, f"pid-{{os.getpid()}}").touch()
    return hangs(case)

for name in CHECKS:
    CHECKS[name] = scripted(noted)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
sys.exit(main(["doctor", "--brief"]))
"""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    waiting = len(ON_DEVICE) - 1 + len(OF_RANKS) + len(OF_TEXT) - 1  # for the first of theirs
    wanted, deadline = len(CHECKS) - waiting, time.monotonic() + 240
    try:
        while len(list(tmp_path.glob("pid-*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(240)
    finally:
        process.kill()
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == wanted
    for pid in pids:
        assert_ended(pid)
    assert number == signal.SIGKILL or list(temporary.iterdir()) == []
