"""Limits of the operating system: shared memory, open files, memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from sleeptrain.distributed.memory import memory_limits
from sleeptrain.doctor.driver import has_driver, wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped

GIB = 2**30
SHARED = Path("/dev/shm")
# NCCL processes on one machine communicate through shared memory; a container gets 64 MiB by default. Bytes.
SHARED_WITH_GPUS, SHARED_WITHOUT = GIB, GIB // 64
OPEN_FILES = 1024
MEMORY = 2 * GIB


def check_shared_memory(case: Case) -> Finding:
    if not sys.platform.startswith("linux"):
        return skipped("Linux only")
    disk = os.statvfs(SHARED)
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    needed = SHARED_WITH_GPUS if has_driver() and wants_gpus(case) else SHARED_WITHOUT
    usage = f"{_gib(free)} of {_gib(size)} free in {SHARED}"
    if free < needed:
        cure = f"docker run --shm-size=8g, or remove old files from {SHARED}"
        return failed(f"{usage}, {_gib(needed)} are needed", cure, free=free, size=size)
    return ok(usage, free=free, size=size)


def check_open_files(case: Case) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        most = 65536 if hard == resource.RLIM_INFINITY else hard
        cure = f"ulimit -n {most}" if most >= OPEN_FILES else "raise nofile in /etc/security/limits.conf"
        return failed(f"{soft} open files, {OPEN_FILES} are needed", cure, soft=soft, hard=hard)
    return ok("unlimited" if soft == resource.RLIM_INFINITY else str(soft), soft=soft, hard=hard)


def check_memory(case: Case) -> Finding:
    free = min([_available(), *(limit - used for limit, used in memory_limits())])
    if free < MEMORY:
        cure = "end the processes that use the memory, or ask the scheduler for more (sbatch --mem)"
        return failed(f"{_gib(free)} free, {_gib(MEMORY)} are needed by one process", cure, free=free)
    return ok(f"{_gib(free)} free", free=free)


def _available() -> int:
    """Bytes of memory that can be used. Without /proc/meminfo: all memory of the machine."""
    table = Path("/proc/meminfo")
    if table.exists():
        rows = dict(line.split(":") for line in table.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
