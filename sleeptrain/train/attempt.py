"""An attempt: one start of a run, of which a run that is stopped and goes on has several."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sleeptrain.distributed.world import World


@dataclass(frozen=True)
class Attempt:
    """number: counted from 1. hosts: in order of rank, each once. job: Slurm's, if any. code: `git describe`, or the
    version of the package where it does not lie in a repository of its own."""

    number: int
    hosts: list[str]
    processes: int
    job: str | None
    code: str


def this_attempt(number: int, world: World) -> Attempt:
    """All processes call it together."""
    hosts = list(dict.fromkeys(world.gather(socket.gethostname())))
    return Attempt(number, hosts, world.size, os.environ.get("SLURM_JOB_ID"), code_version() if world.is_main else "")


def code_version() -> str:
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--tags"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found = ""
        if found:
            return found
    try:
        return version("sleeptrain")
    except PackageNotFoundError:
        return "unknown"
