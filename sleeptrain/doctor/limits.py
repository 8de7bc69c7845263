"""Limits of the operating system: shared memory, open files, memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from sleeptrain.distributed.descriptors import allowed, descriptors_needed
from sleeptrain.distributed.memory import memory_limits
from sleeptrain.doctor.driver import has_driver, num_gpus, wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped

GIB = 2**30
SHARED = Path("/dev/shm")
# NCCL processes on one machine communicate through shared memory; a container gets 64 MiB by default. Bytes.
SHARED_WITH_GPUS, SHARED_WITHOUT = GIB, GIB // 64
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
    """The hard limit counts: a run raises its own limit up to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    size = _world_size(case)
    needed = descriptors_needed(size)
    details = {"soft": soft, "hard": hard, "needed": needed, "processes": size}
    if not allowed(needed):
        cure = "raise nofile in /etc/security/limits.conf, LimitNOFILE of slurmd, or --ulimit nofile of the container"
        return failed(f"{hard} open files, {needed} are needed by rank 0 of {size}", cure, **details)
    return ok("unlimited" if hard == resource.RLIM_INFINITY else f"{hard}, {needed} are needed", **details)


def _world_size(case: Case) -> int:
    """The number of processes of the run: one for each GPU of the job, and at least one model replica."""
    parallel = None if case.config is None else case.config.parallel
    replica = 1 if parallel is None else parallel.tensor * parallel.pipeline
    return max(case.machines * (num_gpus() if wants_gpus(case) else 1), replica)


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
