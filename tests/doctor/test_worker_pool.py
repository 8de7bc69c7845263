"""Checks that crash, hang or fail do not stop the others, and leave no process."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.doctor import worker_pool as pool
from sleeptrain.doctor.checks import CHECKS
from sleeptrain.doctor.finding import FAILED, OK, SKIPPED, Case, Finding, failed, ok
from sleeptrain.errors import DataError
from tests.doctor.cases import assert_ended, found, good, hangs, states

pytestmark = pytest.mark.usefixtures("no_process_stays")


def crashes(case: Case) -> Finding:
    os.write(2, b"the last words\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return ok("never said")


def leaves(case: Case) -> Finding:
    os._exit(3)


def raises(case: Case) -> Finding:
    raise ValueError("two\nlines")


def cannot_load(case: Case) -> Finding:
    raise ImportError("No module named 'torch'")


def refuses(case: Case) -> Finding:
    raise DataError("data/x: no such folder; make it with tools/prepare.py")


FAULTS: dict[Callable[[Case], Finding], tuple[str, str]] = {
    crashes: ("ended by SIGKILL (the last words)", "do this"),
    leaves: ("ended with exit code 3", "do this"),
    raises: ("ValueError: two", "do this"),
    cannot_load: ("cannot be loaded: No module named 'torch'", "do this"),
    refuses: ("data/x: no such folder; make it with tools/prepare.py", ""),
}
# Every fault of a check of one process and of one of several; a crash of each kind of check.
FAULTY = [
    *((name, crashes) for name in ("python", "gpus", "kernel", "collective", "zero")),
    *((name, bad) for name in ("torch", "tensor") for bad in FAULTS),
    ("disk", refuses),
    ("collective", raises),
]


@pytest.mark.parametrize(("name", "bad"), FAULTY)
def test_a_check_that_fails_is_red_and_others_are_made(
    tmp_path: Path, script: Callable[..., None], name: str, bad: Callable[[Case], Finding]
) -> None:
    script(**{name: bad})
    message, cure = FAULTS[bad]
    findings = found(list(CHECKS), tmp_path)
    expected = dict.fromkeys(CHECKS, OK) | {name: FAILED}
    if name == "collective":  # the other checks of several processes could only wait
        expected |= {"tensor": SKIPPED, "zero": SKIPPED}
    assert states(findings) == expected
    assert findings[name].found.removeprefix("process 0 ") == message and findings[name].cure == cure


@pytest.mark.parametrize("name", ["gpus", "tensor", "data"])
def test_a_check_that_hangs_is_red_and_others_are_made(tmp_path: Path, script: Callable[..., None], name: str) -> None:
    script(limit=0.5, **{name: hangs})
    findings = found(list(CHECKS), tmp_path)
    assert states(findings) == dict.fromkeys(CHECKS, OK) | {name: FAILED}
    assert "within 0.5 s" in findings[name].found and findings[name].cure == "do this"


def test_the_process_that_hangs_is_named(tmp_path: Path, script: Callable[..., None]) -> None:
    script(limit=5, tensor=lambda case: hangs(case) if case.rank == 1 else good(case))
    assert found(["tensor"], tmp_path)["tensor"].found == "no answer from process 1 within 5 s"


def test_the_process_that_crashed_is_named(tmp_path: Path, script: Callable[..., None]) -> None:
    """The other process reports first that it has lost its peer."""
    script(tensor=lambda case: crashes(case) if case.rank == 1 else failed("connection closed by peer", "?"))
    assert found(["tensor"], tmp_path)["tensor"].found == "process 1 ended by SIGKILL (the last words)"


def test_a_failure_of_one_process_is_not_hidden_by_another_that_waits(
    tmp_path: Path, script: Callable[..., None]
) -> None:
    script(limit=3600, tensor=lambda case: failed("wrong", "mend it") if case.rank == 1 else hangs(case))
    assert found(["tensor"], tmp_path)["tensor"] == Finding(FAILED, "wrong", "mend it")


def test_processes_that_a_check_has_started_end_with_it(tmp_path: Path, script: Callable[..., None]) -> None:
    started = tmp_path / "pid"

    def starts(case: Case) -> Finding:
        started.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        return hangs(case)

    script(limit=5, disk=starts)
    assert states(found(["disk"], tmp_path)) == {"disk": FAILED}
    assert_ended(int(started.read_text()))


def test_a_check_knows_nothing_of_the_job(
    tmp_path: Path, script: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_JOB_ID", "PMI_RANK", "PMIX_SERVER_URI"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def look(case: Case) -> Finding:
        remaining = [name for name in os.environ if name in pool.PLACES or name.startswith(pool.LAUNCHERS)]
        return ok(f"{remaining} {os.environ['GLOO_SOCKET_IFNAME']} {os.getsid(0) == os.getpid()}")

    script(disk=look, tensor=look)
    findings = found(["disk", "tensor"], tmp_path)
    assert {finding.found for finding in findings.values()} == {"[] lo True"}
