"""`sleeptrain doctor`: its output and its exit code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.commands.doctor import num_machines
from sleeptrain.doctor import report
from sleeptrain.doctor.checks import CHECKS
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped
from tests.doctor.cases import scripted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the findings of checks by name, all others good. No scheduler names this machine."""
    monkeypatch.setattr(report.socket, "gethostname", lambda: "node1.cluster")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)

    def write(**findings: Finding) -> None:
        for name in CHECKS:
            finding = findings.get(name, ok("well"))
            monkeypatch.setitem(CHECKS, name, scripted(lambda case, finding=finding: finding))

    write()
    return write


def test_a_line_for_each_check_and_its_cure(script: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:-1]] == list(CHECKS)
    assert out.splitlines()[-1].startswith(f"all good: {len(CHECKS)} checks, ") and "\033" not in out
    script(disk=failed("full\nto the brim", "free space"), data=skipped("no settings"))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("disk"))
    assert lines[at].split(maxsplit=1)[1] == "FAILED  full to the brim"
    assert lines[at + 1].split(maxsplit=1) == ["cure", "free space"]
    assert lines[-1].startswith(f"1 of {len(CHECKS) - 1} checks") and lines[-1].endswith(": disk failed")


def test_one_line_for_a_machine(script: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    assert main(["doctor", "--brief"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"node1: ok ({len(CHECKS)} checks, ") and out.endswith(" s)\n")
    script(disk=failed("full\nto the brim", "free space"), data=failed("gone; make it", ""), gpus=skipped("none"))
    assert main(["doctor", "--brief"]) == 1
    assert capsys.readouterr().out == "node1: FAILED disk: full to the brim; free space | data: gone; make it\n"
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-007")
    assert main(["doctor", "--brief"]) == 1
    assert capsys.readouterr().out.startswith("gpu-007: FAILED")


def test_a_skipped_check_is_not_made(script: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def never(case: Case) -> Finding:
        return failed("was made", "")

    script(disk=failed("full", ""), collective=failed("slow", ""))
    assert main(["doctor", "--skip", "disk", "--brief", "--skip", "collective"]) == 0
    assert capsys.readouterr().out.startswith(f"node1: ok ({len(CHECKS) - 2} checks, ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--skip", "dusk"], "--skip dusk: no such check; there are python, "),
        (["experiment=rule110", "sleep.pases=2"], "did you mean 'sleep.passes'?"),
        (["experiment=rule111"], "rule111"),
        (["run.root=/tmp"], "run.name"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(
    script: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["doctor", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and words in output.err and output.err.count("\n") == 1


def test_forms_exclude_each_other(script: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--brief"]) == 2
    assert main(["doctor", "--help"]) == 0
    assert "--skip NAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, 1),
        ({"SLURM_JOB_NUM_NODES": "4"}, 4),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 1),
        ({"WORLD_SIZE": "8"}, 1),
    ],
)
def test_how_many_machines_the_job_has(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], number: int
) -> None:
    for name in ("SLURM_JOB_NUM_NODES", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert num_machines() == number


@pytest.mark.slow
def test_the_command_at_the_start_of_a_job(tmp_path: Path) -> None:
    """srun starts the command as one process of eight, and there is no first one at the address."""
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    job |= {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "203.0.113.1", "MASTER_PORT": "29500"}
    environment = os.environ | job | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sleeptrain", "doctor", "--json", "experiment=rule110"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"], done.stderr) == (0, True, ""), done
    assert set(answer) == {"machine", "system", "ok", "seconds", "checks"}
    assert [check["name"] for check in answer["checks"]] == list(CHECKS)
    for check in answer["checks"]:
        assert set(check) == {"name", "seconds", "state", "found", "cure", "details"}
        assert check["state"] in ("ok", "skipped") and check["found"] and check["seconds"] >= 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root renames a machine")
def test_a_host_name_without_an_address(tmp_path: Path) -> None:
    """The machine has the name in a namespace only, in a job of two machines."""
    skips = [word for name in CHECKS if name != "hostname" for word in ("--skip", name)]
    doctor = shlex.join([sys.executable, "-m", "sleeptrain", "doctor", "--brief", *skips])
    command = ["unshare", "--uts", "sh", "-c", f"hostname nowhere.invalid && exec {doctor}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("GLOO_SOCKET_IFNAME", "SLURMD_NODENAME")}
    environment |= {"PYTHONPATH": str(ROOT), "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 1, done
    assert done.stdout.startswith("nowhere: FAILED hostname: nowhere.invalid has no address")
    assert "; export GLOO_SOCKET_IFNAME=" in done.stdout


def test_it_starts_where_packages_are_missing(tmp_path: Path) -> None:
    """None of the packages that runs need can be loaded."""
    code = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "hydra", "omegaconf", "megatron", "deepspeed", "packaging"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Refuse())
from sleeptrain.cli import main
sys.exit(main(["doctor", "--json"]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 1, done
    answer = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in ("python", "packages", "torch", "kernel", "collective"):
        assert answer[name]["state"] == "failed" and "No module named" in answer[name]["found"] and answer[name]["cure"]
    for name in ("disk", "hostname", "open_files", "shared_memory"):
        assert answer[name]["state"] == "ok"
