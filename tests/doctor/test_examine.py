"""There is one process for each check or GPU, and none after the examination."""

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

pytestmark = pytest.mark.usefixtures("no_process_stays")


def test_there_is_a_process_for_each_gpu(tmp_path: Path, script: Callable[..., None]) -> None:
    script(torch=lambda case: ok("", devices=3), collective=lambda case: ok(f"{case.rank} of {case.size}"))
    assert found(["torch", "collective"], tmp_path)["collective"].found == "0 of 3"


def test_a_caller_that_stops_reading_leaves_no_process(tmp_path: Path, script: Callable[..., None]) -> None:
    script(data=hangs)
    results = examine(["python", "data"], alone(tmp_path))
    assert next(results).name == "python"
    results.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_processes_of_a_doctor_end_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """In each check a process hangs, after it has written its number into a file name."""
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
    waiting = len(ON_DEVICE) - 1 + len(OF_RANKS) + len(OF_TEXT) - 1  # these wait for the first check of their group
    expected, deadline = len(CHECKS) - waiting, time.monotonic() + 240
    try:
        while len(list(tmp_path.glob("pid-*"))) < expected and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(240)
    finally:
        process.kill()
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == expected
    for pid in pids:
        assert_ended(pid)
    assert number == signal.SIGKILL or list(temporary.iterdir()) == []
