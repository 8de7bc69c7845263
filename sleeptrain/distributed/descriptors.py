"""Descriptors (open files and sockets) of a process, and the limit that the system sets on their number."""

from __future__ import annotations

import resource

from sleeptrain.data.shard_open import OPEN_SHARDS
from sleeptrain.errors import ConfigError

# Files and sockets of the interpreter, its libraries, CUDA and NCCL.
OTHERS = 256
# Process groups that communicate over gloo: the world, control, saving, and on a CPU those of megatron-core.
GROUPS = 16


def descriptors_needed(world_size: int, main: bool = True) -> int:
    """The most descriptors that a process of a run has open at a time.

    gloo connects two ranks when they first communicate. In an exchange over all ranks a rank communicates with a few
    neighbours, and with those at distances 1, 2, 4 and so on. Where one rank gathers from all, it has a socket to each:
    rank 0 when it plans a checkpoint, and over gloo also each rank that owns tensors of one.
    main: rank 0, which may hold the store, to which each process has two connections.
    """
    needed = OPEN_SHARDS + OTHERS
    if world_size == 1:
        return needed
    neighbours = 2 * (world_size - 1).bit_length() + 3
    return needed + GROUPS * min(neighbours, world_size) + world_size * (3 if main else 1)


def raise_limit(needed: int, what: str) -> None:
    """Raise this process's limit to its hard limit if `needed` descriptors are more than it allows.

    Raises ConfigError if the hard limit is lower than that. what: the subject of the message.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _allows(soft, needed):
        return
    if not _allows(hard, needed):
        raise ConfigError(
            f"{what} needs {needed} open files, and the hard limit is {hard} (ulimit -Hn): raise nofile in "
            "/etc/security/limits.conf, LimitNOFILE of slurmd, or --ulimit nofile of the container"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def allowed(needed: int) -> bool:
    """True if the hard limit, to which a run raises its own, allows `needed` descriptors."""
    return _allows(resource.getrlimit(resource.RLIMIT_NOFILE)[1], needed)


def _allows(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
