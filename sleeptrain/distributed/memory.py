"""The memory that the processes of a run may use. Limits are read without torch, which may be missing."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sleeptrain.distributed.world import World

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine as far as a scheduler or a container lets this process use it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit, _ in memory_limits())])


def least_memory(world: World) -> int:
    """Bytes of the process that has the least memory, the same in all processes, which call it together.

    Processes on CPUs of one machine share its memory.
    """
    machine = socket.gethostname() if world.device.type == "cpu" else f"GPU of rank {world.rank}"
    found = world.gather((machine, device_memory(world.device)))
    sharing = Counter(name for name, _ in found)
    return min(size // sharing[name] for name, size in found)


def memory_limits() -> Iterator[tuple[int, int]]:
    """(bytes of the limit, bytes used) of this process's cgroup and of each parent: a scheduler's or a container's."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = CGROUPS / kinds
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for place in [group, *group.parents]:
            if place.is_relative_to(root) and (place / limit).is_file() and (place / used).is_file():
                maximum = (place / limit).read_text().strip()
                if maximum.isdigit():
                    yield int(maximum), int((place / used).read_text())
