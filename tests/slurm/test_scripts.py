"""The batch scripts without a cluster: their options fit each other, and containers get the right arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.distributed.gpus import find_gpu
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.report import worst_total
from tests.slurm.jobs import ROOT

SCRIPTS = ("pretrain_2b", "pretrain_7b", "pretrain_30b", "pretrain_70b", "continue_qwen3_5_2b", "rule110_sweep")


def sbatch_options(script: str) -> dict[str, str]:
    """The options of the #SBATCH lines."""
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    return {key: value for key, _, value in re.findall(r"^#SBATCH --([a-z-]+)(=(.*))?$", text, re.MULTILINE)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_stopped_and_queued_again(script: str) -> None:
    options = sbatch_options(script)
    assert options["open-mode"] == "append" and "requeue" in options
    assert options["signal"].startswith("B:USR1@")
    assert ("dependency" in options) != ("array" in options)


@pytest.mark.parametrize("script", SCRIPTS[:5])
def test_a_run_fits_the_gpus_that_its_script_requests(script: str) -> None:
    options = sbatch_options(script)
    assert options["job-name"] == script and options["gpus-per-node"] == options["ntasks-per-node"]
    config = compose([f"experiment={script}"])
    plan = make_plan(config, int(options["nodes"]) * int(options["ntasks-per-node"]), find_gpu("H200"), 0.4)
    assert (config.run.root, config.run.name) == ("runs", script)
    assert plan.gpu is not None and worst_total(plan) < 0.9 * plan.gpu[1].memory


def words(runtime: str, tmp_path: Path, **more: str) -> str:
    """The arguments that start a task in a container."""
    script = (
        "source slurm/launch.sh; choose_container; "
        '"${inside[@]}" "$PYTHON" -m sleeptrain train "a b"; printf "%s\\n" "${container_flags[@]}"'
    )
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("apptainer", "enroot"):  # not installed here: stand-ins print their arguments
        (programs / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (programs / name).chmod(0o755)
    settings = {"CONTAINER_RUNTIME": runtime, "CONTAINER_IMAGE": "the image", "RUN_ROOT": str(tmp_path), **more}
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_PROCID": "3", **settings}
    command = ["bash", "-c", script if runtime != "pyxis" else script.replace('"${inside[@]}"', "true")]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    ).stdout


def test_pyxis(tmp_path: Path) -> None:
    flags = ["--container-image=the image", f"--container-workdir={ROOT}"]
    mounts = f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path},/data:/data"
    assert words("pyxis", tmp_path, CONTAINER_MOUNTS="/data").splitlines() == [*flags, mounts]


def test_apptainer(tmp_path: Path) -> None:
    binds = ["--bind", str(ROOT), "--bind", str(tmp_path), "--bind", "/data"]
    argv = words("apptainer", tmp_path, CONTAINER_MOUNTS="/data").split("\n")
    assert argv[:-1] == [
        "exec", "--nv", "--pwd", str(ROOT), *binds, "the image", "python", "-m", "sleeptrain", "train", "a b", "",
    ]  # fmt: skip


def test_enroot(tmp_path: Path) -> None:
    """It passes the variables of the task on, most of all the rank."""
    argv = words("enroot", tmp_path).splitlines()
    assert argv[0] == "start" and "SLURM_PROCID" in argv
    end = argv[argv.index("--mount") :]
    mounts = ["--mount", f"{ROOT}:{ROOT}", "--mount", f"{tmp_path}:{tmp_path}"]
    assert end[:5] == [*mounts, "the image"] and end[-5:-1] == ["-m", "sleeptrain", "train", "a b"]


def test_another_runtime_is_refused(tmp_path: Path) -> None:
    assert "CONTAINER_RUNTIME=docker: write pyxis, apptainer or enroot" in words("docker", tmp_path)


def ports(job: int, attempt: int) -> list[int]:
    """The ports at which the tasks of each step of an attempt meet."""
    script = (
        'source slurm/launch.sh; srun() { echo "$MASTER_PORT"; }; inside=() container_flags=() asked= ended= PYTHON=; '
        "for i in 1 2 3; do step -- words; done"
    )
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(attempt)}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def test_each_step_of_each_attempt_meets_at_its_own_port() -> None:
    """No port is one that the system may give to an outgoing connection."""
    found = [ports(job, attempt) for job in (1234567, 1234568) for attempt in range(3)]
    assert all(len(steps) == 3 for steps in found)
    assert len({port for steps in found for port in steps}) == 18
    assert all(10_000 < port < 32_768 for steps in found for port in steps)


def started(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script until it knows its run, with stand-ins for the programs of Slurm."""
    script = (
        "source slurm/launch.sh\n"
        'srun() { while [[ $1 == --* ]]; do shift; done; "$@"; }\n'
        "set_environment() { :; }\n"
        'count_attempt() { echo "run=$run"; exit 0; }\n'
        "EXPERIMENT=rule110 launch $WORDS"
    )
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NAME": "job", "PYTHON": sys.executable}
    environment = {"PATH": os.environ["PATH"], "WORDS": "", **job, **variables}
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["2026_07_20", "it's a, b=c"])
def test_a_job_finds_the_folder_of_its_run(tmp_path: Path, name: str) -> None:
    found = started(tmp_path, RUN_ROOT=str(tmp_path), RUN_NAME=name)
    assert found.stdout.splitlines() == [f"run={tmp_path}/{name}"], found.stderr


def test_a_job_whose_settings_are_wrong_is_not_queued_again(tmp_path: Path) -> None:
    found = started(tmp_path, RUN_ROOT=str(tmp_path), WORDS="sleep.pases=4")
    assert found.returncode == 2 and "the settings do not fit; not queued again" in found.stdout
    assert "did you mean 'sleep.passes'" in found.stderr


@pytest.mark.parametrize("folder", ["it's", "true", "a b=c,d{e}[f] \\n", "a\\", "a\\\\'b"])
def test_a_name_reaches_the_program_as_it_is(folder: str) -> None:
    command = ["bash", "-c", 'source slurm/launch.sh; quoted "$1"', "bash", folder]
    quoted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert compose(["experiment=rule110", f"run.root={quoted}"]).run.root == folder


SRUN = r"""#!/usr/bin/env bash
echo "$MASTER_ADDR $*" >>"$CLUSTER/steps"
case "$*" in
    *--print-run-folder*) echo "$CLUSTER/run" ;;
    *"sleeptrain doctor"*)
        unfit=$UNFIT$(cat "$CLUSTER/broken" 2>/dev/null)
        case "$*" in *--nodelist=*) ;; *) [ -z "$unfit" ]; exit ;; esac
        for node in $unfit; do case "$*" in *"--nodelist=$node "*) exit 1 ;; esac; done ;;
    *" -c ")
        # The memory of the last step is free only at the second try.
        [ -e "$CLUSTER/tried" ] || { touch "$CLUSTER/tried" && exit 1; } ;;
    *"sleeptrain plan"*) [ -z "$TOO_FEW" ] ;;
    *"sleeptrain train"*)
        read -r code checkpoint <"$CLUSTER/attempts" && sed -i 1d "$CLUSTER/attempts"
        [ -z "$checkpoint" ] || echo "$checkpoint" >"$CLUSTER/run/checkpoints/latest"
        echo "$BREAKS" >"$CLUSTER/broken"
        exit "$code" ;;
esac
"""
SCONTROL = r"""#!/usr/bin/env bash
case "$1" in
    show) [ "$2" = hostlist ] && echo "$3" || printf 'n1\nn2\nn3\n' ;;
    requeue) echo "the job is in the queue" && kill "$PPID" ;;
esac
"""


class Attempts:
    """A batch script on three nodes of two tasks, with stand-ins for the programs of Slurm, and what it did.

    attempts: how each attempt ends: the code, and the name of a new checkpoint.
    """

    def __init__(self, folder: Path, *attempts: str, **variables: str) -> None:
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "run" / "checkpoints").mkdir(parents=True)
        (folder / "run" / "checkpoints" / "latest").write_text("old\n")
        (folder / "attempts").write_text("".join(f"{attempt}\n" for attempt in attempts))
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS": "6", "SLURM_JOB_NAME": "job"}
        base = {
            "PYTHON": sys.executable,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CLUSTER": str(folder),
            "SLURM_JOB_NODELIST": "n[1-3]",
        }
        base |= dict.fromkeys(("UNFIT", "BREAKS", "TOO_FEW"), "") | {"FREE_SECONDS": "0"}
        script = "source slurm/launch.sh; EXPERIMENT=rule110 launch"
        self.done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=base | job | variables,
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        self.log = self.done.stdout
        lines = (folder / "steps").read_text().splitlines() if (folder / "steps").exists() else []
        # (the node where tasks meet, nodes, tasks) of each attempt
        self.trained = [
            (line.split()[0], *re.findall(r"--nodelist=(\S+) --ntasks=(\d+)", line)[0])
            for line in lines
            if "sleeptrain train" in line and "--print" not in line
        ]
        self.queued_again = "the job is in the queue" in self.log


def test_a_failed_run_is_tried_once_more_in_its_allocation(tmp_path: Path) -> None:
    found = Attempts(tmp_path, "1 new", "0")
    assert found.done.returncode == 0 and not found.queued_again, found.log
    assert found.trained == [("n1", "n1,n2,n3", "6")] * 2
    assert "ended with code 1 at new" in found.log and "from new, attempt 1 of 3" in found.log


def test_the_allocation_is_given_back_after_two_attempts_that_saved_nothing_new(tmp_path: Path) -> None:
    found = Attempts(tmp_path, "1", "1", "0")
    assert found.queued_again and len(found.trained) == 2, found.log


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_spare_takes_the_place_of_a_node_that_is_not_fit(tmp_path: Path, when: str) -> None:
    """Also of the first node, where the tasks meet."""
    if when == "later":
        found = Attempts(tmp_path, "1 new", "0", NODES="2", BREAKS="n1")
        assert found.trained == [("n1", "n1,n2", "4"), ("n2", "n2,n3", "4")], found.log
    else:
        found = Attempts(tmp_path, "0", NODES="2", UNFIT="n1")
        assert found.trained == [("n2", "n2,n3", "4")], found.log
    assert found.done.returncode == 0 and "n1 is not fit" in found.log


def test_without_a_spare_the_fit_nodes_go_on_if_the_run_fits_them(tmp_path: Path) -> None:
    found = Attempts(tmp_path, "1 new", "0", BREAKS="n2")
    assert found.trained == [("n1", "n1,n2,n3", "6"), ("n1", "n1,n3", "4")], found.log
    assert found.done.returncode == 0 and not found.queued_again


def test_nodes_that_are_too_few_for_the_run_are_given_back(tmp_path: Path) -> None:
    found = Attempts(tmp_path, "1 new", "0", BREAKS="n2", TOO_FEW="yes")
    assert found.queued_again and len(found.trained) == 1, found.log


def test_a_node_that_is_not_fit_ends_a_job_without_spares(tmp_path: Path) -> None:
    found = Attempts(tmp_path, "0", UNFIT="n3")
    assert found.done.returncode == 1 and "a node is not fit" in found.log and not found.trained


def test_a_run_that_was_asked_to_save_is_queued_again(tmp_path: Path) -> None:
    found = Attempts(tmp_path, "75 new", "0")
    assert found.queued_again and len(found.trained) == 1 and "looks for nodes" not in found.log


@pytest.mark.parametrize("nodes", ["4", "0", "two"])
def test_more_nodes_than_the_job_has_are_refused(tmp_path: Path, nodes: str) -> None:
    found = Attempts(tmp_path, "0", NODES=nodes)
    assert found.done.returncode == 2 and f"NODES={nodes}, but the job has 3 nodes" in found.log
    assert not found.trained
