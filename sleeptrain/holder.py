"""The process that holds a lease on a folder, and whether it is alive, if this machine can see that."""

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
    """The process that holds a lease.

    token: random name of this lease.
    host: host name.
    pid: process id on its machine.
    machine: result of `machine()` on its machine.
    began: result of `began(pid)` on its machine.
    since: when it took the lease, in seconds since 1970.
    job: Slurm job id, if any.
    facts: further values for messages, by name.
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
        """True if this process can see whether the holder is alive."""
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
    """The holder that a lease file names; None if there is no file. Raises OSError if it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        values = parse_json(content)
        if not _IS_HOLDER(values):
            raise ValueError(f"{path} names no holder")
        return Holder(**values)
    except ValueError:  # its writer was killed while writing it, or it comes from another program
        return Holder(content.hex(), "an unknown host", 0, "", 0, time.time(), None, {})


def machine() -> str:
    """The boot id and the PID namespace, inside which a PID names one process; "" if they are unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def began(pid: int) -> int:
    """Start time of a process of this machine, in clock ticks since the boot; 0 if /proc does not have it."""
    try:
        return int(_stat(pid)[19])
    except OSError:
        return 0


def _is_alive(pid: int, start_ticks: int) -> bool:
    """True if the process of this machine with this PID and start time still runs.

    False for a zombie and for a later process with the same PID.
    """
    try:
        fields = _stat(pid)
        if fields[0] in (b"Z", b"X") and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return False
        return int(fields[19]) == start_ticks
    except OSError:
        return _is_hidden(pid)


def _is_hidden(pid: int) -> bool:
    """True if the process exists, belongs to another user, and is hidden in /proc."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat after the process name, which may hold any character."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def last_sign(path: Path) -> int:
    """When a lease was last touched, in ns. Opening the file makes a network file system ask its server."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
