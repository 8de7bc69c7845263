"""What the operating system gives a process: shared memory, open files, memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from sleeptrain.doctor.driver import has_driver, wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped

GIB = 2**30
SHARED = Path("/dev/shm")
# NCCL's processes on a machine speak through it; a container gets 64 MiB unless it is asked for more.
SHARED_WITH_GPUS, SHARED_WITHOUT = GIB, GIB // 64
OPEN_FILES = 1024
MEMORY = 2 * GIB
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def check_shared_memory(case: Case) -> Finding:
    if not sys.platform.startswith("linux"):
        return skipped("of Linux only")
    told = os.statvfs(SHARED)
    free, size = told.f_bavail * told.f_frsize, told.f_blocks * told.f_frsize
    wanted = SHARED_WITH_GPUS if has_driver() and wants_gpus(case) else SHARED_WITHOUT
    said = f"{_gib(free)} of {_gib(size)} free in {SHARED}"
    if free < wanted:
        cure = f"docker run --shm-size=8g, or free {SHARED} of files left behind"
        return failed(f"{said}, {_gib(wanted)} are needed", cure, free=free, size=size)
    return ok(said, free=free, size=size)


def check_open_files(case: Case) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        most = 65536 if hard == resource.RLIM_INFINITY else hard
        cure = f"ulimit -n {most}" if most >= OPEN_FILES else "raise nofile in /etc/security/limits.conf"
        return failed(f"{soft} open files, {OPEN_FILES} are needed", cure, soft=soft, hard=hard)
    return ok("unlimited" if soft == resource.RLIM_INFINITY else str(soft), soft=soft, hard=hard)


def check_memory(case: Case) -> Finding:
    free = min([_available(), *_left_by_cgroups()])
    if free < MEMORY:
        cure = "end what uses the memory, or ask the scheduler for more (sbatch --mem)"
        return failed(f"{_gib(free)} free, {_gib(MEMORY)} are needed by a process alone", cure, free=free)
    return ok(f"{_gib(free)} free", free=free)


def _available() -> int:
    """Without what caches would give back where that is not told."""
    table = Path("/proc/meminfo")
    if table.exists():
        rows = dict(line.split(":") for line in table.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_cgroups() -> Iterator[int]:
    """What the limits of this process's group and those above it leave: a scheduler's or container's."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = CGROUPS / kinds
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for place in [group, *group.parents]:
            if place.is_relative_to(root) and (place / limit).is_file() and (place / used).is_file():
                most = (place / limit).read_text().strip()
                if most.isdigit():
                    yield int(most) - int((place / used).read_text())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
