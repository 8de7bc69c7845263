"""An attempt: one start of a run. A run that is stopped and started again has several."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from sleeptrain.distributed.nccl import recorded

if TYPE_CHECKING:  # a report reads the status of runs and needs no torch
    from sleeptrain.distributed.world import World


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    number: counted from 1.
    hosts: the host names in the order of the ranks, each once.
    processes: the number of processes.
    job: the Slurm job's id; None without Slurm.
    code: `git describe` of the checkout, or the version of the installed package.
    environment: the main process's variables of NCCL, gloo and the like (`sleeptrain.distributed.nccl.recorded`).
    """

    number: int
    hosts: list[str]
    processes: int
    job: str | None
    code: str
    environment: dict[str, str] = field(default_factory=dict)


def this_attempt(number: int, world: World) -> Attempt:
    """Describe this attempt. All processes call it together."""
    hosts = list(dict.fromkeys(world.gather(socket.gethostname())))
    job, code = os.environ.get("SLURM_JOB_ID"), code_version() if world.is_main else ""
    return Attempt(number, hosts, world.size, job, code, recorded(os.environ))


def code_version() -> str:
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--tags"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = ""
        if commit:
            return commit
    try:
        return version("sleeptrain")
    except PackageNotFoundError:
        return "unknown"
