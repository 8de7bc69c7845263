"""Jobs of the repository's own batch scripts, with a tiny experiment, and the results of their runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from local_slurm import Cluster

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config import Config
from sleeptrain.config.compose import compose
from sleeptrain.train.logging.metrics import read_metrics
from tests.checkpoint.contents import tensors

ROOT = Path(__file__).resolve().parents[2]
NODES = 4  # in the cluster; a job takes two, so that two remain when one is lost
STEPS, ROWS = 80, 8
SPEEDS = ("time", "tokens_per_second", "passes_per_second", "mfu", "memory_mb", "eta_seconds", "failed_saves", "speed")
SETTINGS = (
    "data.rule110.width=6",
    "data.rule110.steps=2",
    "data.rule110.validation_samples=16",
    f"data.batch={ROWS}",
    f"train.tokens={STEPS * ROWS * 7}",
    "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet]",
    "model.dim=16",
    "model.ffn_dim=16",
    "model.attention.head_dim=8",
    "sleep.passes=2",
    "train.device=cpu",
    "train.threads=1",
    "train.log_every=1",
    "train.eval_every=50",
    "train.eval_batches=2",
    "checkpoint.every=10",
    "wandb.mode=disabled",
)
# The scripts have the numbers of a real run.
SMALL = ("--cpus-per-task=1", "--time=10")
TWO_BY_TWO = (*SMALL, "--nodes=2", "--ntasks-per-node=2")
LAST = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
# Seconds until something must have happened; a busy machine takes its time.
PATIENCE = 400.0


def configuration(root: Path, *more: str) -> Config:
    return compose(["experiment=rule110", f"run.root={root}", "run.name=r", *SETTINGS, *more])


class Jobs:
    """Submits jobs whose runs are in one folder; a run without a name is `folder/r`."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def submit(
        self, *settings: str, flags: Sequence[str] = TWO_BY_TWO, script: str = "pretrain_2b", **variables: str
    ) -> Job:
        """Submit the script as it is; the flags of sbatch override those in the script."""
        base = {"EXPERIMENT": "rule110", "RUN_ROOT": str(self.folder), "PYTHON": sys.executable, "DOCTOR": "off"}
        base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = ["sbatch", "--parsable", "--job-name=r", f"--output={self.folder / '%x-%j.log'}", *flags]
        environment = self.cluster.environment | base | variables
        done = subprocess.run(
            [*command, f"slurm/{script}.sh", *SETTINGS, *settings],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Job(self.cluster, done.stdout.strip(), self.folder)


class Job:
    def __init__(self, cluster: Cluster, number: str, folder: Path) -> None:
        self.cluster, self.number, self.run = cluster, number, folder / "r"
        self._log = folder / f"r-{number}.log"

    @property
    def log(self) -> str:
        lines = self._log.read_text().splitlines() if self._log.exists() else ["(nothing)"]
        return "\n".join(line for line in lines if not line.startswith("step "))

    @property
    def facts(self) -> dict[str, str]:
        """The fields that Slurm shows for the job."""
        lines = self.cluster.ask("scontrol", "show", "job", "-o", self.number)
        return dict(word.split("=", 1) for word in " ".join(lines[:1]).split() if "=" in word)

    @property
    def steps(self) -> list[int]:
        """The steps in the records of the run."""
        return [record["step"] for record in records(self.run) if "loss" in record]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return [record["attempt"] for record in records(self.run) if "attempt" in record]

    def wait(self, what: str, ready: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until `ready`; fail if the job ends before, or nothing happens for long."""
        deadline = time.monotonic() + patience
        while not ready():
            state = self.facts.get("JobState")
            assert state not in LAST or ready(), f"{state} before {what}\n{self.log}"
            assert time.monotonic() < deadline, f"{state}: waited {patience:g} s for {what}\n{self.log}"
            time.sleep(0.1)

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        def made() -> bool:
            numbers = [a["number"] for a in self.attempts]
            return bool(numbers) and numbers[-1] >= attempt and max(self.steps, default=0) >= step

        self.wait(f"step {step} in attempt {attempt}", made)

    def notice(self) -> None:
        """Send the signal that Slurm sends ahead of a time limit."""
        self.cluster.ask("scancel", "--batch", "--signal=USR1", self.number)

    def end(self) -> tuple[str, str]:
        """Wait for the end of the job: (state, exit code)."""
        deadline = time.monotonic() + PATIENCE
        while (facts := self.facts).get("JobState") not in LAST:
            assert time.monotonic() < deadline, f"{facts}: did not end in {PATIENCE:g} s\n{self.log}"
            time.sleep(0.1)
        return facts["JobState"], facts["ExitCode"].split(":")[0]

    def check_completed(self, attempts: int) -> None:
        """Check that the run is finished after so many attempts, and made each step once."""
        assert self.end() == ("COMPLETED", "0"), self.log
        assert [a["number"] for a in self.attempts] == list(range(1, attempts + 1)), self.log
        assert self.steps == list(range(1, STEPS + 1)), self.log
        assert {a["job"] for a in self.attempts} == {self.number}
        assert len(re.findall("queued again", self.log)) <= attempts - 1


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return list(read_metrics(path)) if path.exists() else []


def check_same(run: Path, other: Path) -> None:
    """Check that two runs ended with the same bits, and have the same records."""
    found, wanted = (tensors(checkpoints(r / "checkpoints")[-1]) for r in (run, other))
    assert found.keys() == wanted.keys() and len(found) > 20
    assert not [name for name in found if not torch.equal(found[name], wanted[name])]
    assert stable_records(run) == stable_records(other)


def check_alike(run: Path, other: Path) -> None:
    """Check that two runs ended with the same weights up to rounding, after the same steps."""
    found, wanted = (tensors(checkpoints(r / "checkpoints")[-1]) for r in (run, other))
    for name in (name for name in wanted if name.startswith("model/")):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)
    losses = [[r["loss"] for r in records(r) if "loss" in r] for r in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def stable_records(run: Path) -> list[dict[str, Any]]:
    kept = [{k: v for k, v in r.items() if k not in SPEEDS} for r in records(run) if "attempt" not in r]
    return [record for record in kept if record.keys() - {"step", "tokens"}]


def ranks_on(node: str, cluster: Cluster) -> list[int]:
    """The numbers of the processes that train on a node."""
    found = []
    for pid in cluster.processes_of(node):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:4] == [b"-m", b"sleeptrain", b"train"]:
            found.append(int(pid))
    return found
