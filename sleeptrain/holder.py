"""Who holds a lease on a folder, and whether that process is alive, as far as this machine can tell."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeptrain.kinds import dict_of, exactly, is_count, is_text, is_time, or_none
from sleeptrain.small_files import parse_json

_IS_HOLDER = exactly(
    {
        **dict.fromkeys(("token", "host", "machine"), is_text),
        "pid": lambda pid: is_count(pid) and pid < 2**31,
        "began": is_count,
        "since": is_time,
        "job": or_none(is_text),
        "facts": dict_of(lambda _: True),
    }
)


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    machine: see the function. began: of the process, as the function of that name says it there. job: Slurm's, if any.
    facts: what else it says of itself.
    """

    token: str
    host: str
    pid: int
    machine: str
    began: int
    since: float
    job: str | None
    facts: Mapping[str, Any]

    @property
    def is_local(self) -> bool:
        """Whether this process can see if the holder lives."""
        return self.machine == machine() != ""

    @property
    def has_ended(self) -> bool:
        return self.is_local and not _is_alive(self.pid, self.began)

    def __str__(self) -> str:
        facts = [f"Slurm job {self.job}"] if self.job else []
        facts += [f"{name} {value}" for name, value in self.facts.items()]
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} ({', '.join([*facts, f'since {since}'])})"


def read_holder(path: Path) -> Holder | None:
    """Who a lease file names; None where there is no file. Raises OSError where it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = parse_json(content)
        if not _IS_HOLDER(found):
            raise ValueError(f"{path} names no holder")
        return Holder(**found)
    except ValueError:  # of somebody who was killed while writing it, or of another program
        return Holder(content.hex(), "an unknown host", 0, "", 0, time.time(), None, {})


def machine() -> str:
    """This boot of this machine and the PID namespace, where a number names one process; "" where that is unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def began(pid: int) -> int:
    """When a process of this machine began, in ticks since the boot; 0 where /proc does not say."""
    try:
        return int(_stat(pid)[19])
    except OSError:
        return 0


def _is_alive(pid: int, its_beginning: int) -> bool:
    """Whether a process of this machine that began then still runs: a zombie does not, nor another of its number."""
    try:
        fields = _stat(pid)
        if fields[0] in (b"Z", b"X") and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return False
        return int(fields[19]) == its_beginning
    except OSError:
        return _is_hidden(pid)


def _is_hidden(pid: int) -> bool:
    """Whether a process that /proc does not show is there, of another user."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _stat(pid: int) -> list[bytes]:
    """The fields behind the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def last_sign(path: Path) -> int:
    """When a lease was last touched. The file is opened, since a network file system asks its server then."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
