"""The links of a job, measured by all its processes: messages between pairs, and sums inside machines and over all.

Pairs that share no process are measured at the same time, as in a run. Inside a machine every process meets every
other one; between machines processes with the same local rank do, all of them up to 16 machines, and beyond that those
at distances 1, 2, 4 and so on. So the time grows with the logarithm of the machines, and each process has several
links by which a slow machine can be told from a slow link.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist

from sleeptrain.distributed.launch import LAZY_GLOO, find_device, find_place
from sleeptrain.distributed.meeting import MEET_WITHIN, Limit, meet
from sleeptrain.doctor.links_report import Link, Links, Sum
from sleeptrain.errors import ConfigError

TIMEOUT = timedelta(seconds=120)
# Seconds after which no further pairs are measured.
ENOUGH = 120.0
ALL_PAIRS = 16
# Of a message and of a sum, by device. Larger ones would only take longer.
NUM_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
BOUNCES, SENDS, SUMS = 20, 3, 3


def measure_links() -> tuple[int, Links]:
    """(this process's rank, the links of the job). All processes of a job of torchrun or srun call it together.

    Raises ConfigError for one process alone, and MeetingError if the processes do not meet.
    """
    place = find_place(os.environ)
    if place.size == 1:
        raise ConfigError(
            "--links measures the links between the processes of a job: start one for each GPU, by srun or torchrun "
            "(torchrun --nproc-per-node 8 -m sleeptrain doctor --links)"
        )
    device = find_device("auto", place.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.host:
        os.environ |= {"MASTER_ADDR": place.host, "MASTER_PORT": str(place.port)}
    os.environ[LAZY_GLOO] = "1"
    warnings.filterwarnings("ignore", ".*deprecated.*", FutureWarning, "torch.distributed")
    store = meet(place.rank, place.size, "doctor --links", MEET_WITHIN, Limit())
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=TIMEOUT)
    links = measure(device, socket.gethostname())
    dist.barrier()
    dist.destroy_process_group()
    return place.rank, links


def measure(device: torch.device, machine: str) -> Links:
    """Measure the links of all processes of torch.distributed, which call it together. machine: of this process."""
    machines: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(machines, machine)
    own, began, left_out = list[Link](), time.monotonic(), 0
    for pairs in rounds(machines):
        if left_out or _latest(time.monotonic() - began, device) > ENOUGH:
            left_out += len(pairs)
            continue
        for a, b in pairs:
            if dist.get_rank() in (a, b):
                latency, rate = _pair(a, b, device)
                own += [Link(a, b, latency, rate)] if dist.get_rank() == a else []
    parts: list[list[Link]] = [[] for _ in machines]
    dist.all_gather_object(parts, own)
    return Links(
        dist.get_backend(), machines, [link for part in parts for link in part], _sums(machines, device), left_out
    )


def rounds(machines: Sequence[str]) -> Iterator[list[tuple[int, int]]]:
    """Rounds of pairs of ranks; in a round no rank has two. machines: the machine of each rank."""
    members: dict[str, list[int]] = defaultdict(list)
    for rank, machine in enumerate(machines):
        members[machine].append(rank)
    by_machine = list(members.values())
    columns = [
        [ranks[local] for ranks in by_machine if local < len(ranks)] for local in range(max(map(len, by_machine)))
    ]
    for groups in (by_machine, columns):  # inside machines, then between them
        pairings = [_pairings(len(ranks)) for ranks in groups]
        for turn in zip_longest(*pairings, fillvalue=[]):
            if pairs := [(ranks[a], ranks[b]) for ranks, own in zip(groups, turn, strict=True) for a, b in own]:
                yield pairs


def _pairings(count: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs among `count` members: all pairs (a round-robin), or those at distances of powers of two."""
    if count <= ALL_PAIRS:
        even = count + count % 2
        found = []
        for turn in range(even - 1):
            ring = [0, *(1 + (turn + i) % (even - 1) for i in range(even - 1))]
            pairs = (sorted((ring[i], ring[-1 - i])) for i in range(even // 2))
            found.append([(a, b) for a, b in pairs if b < count])
        return found
    distances = (1 << n for n in range((count - 1).bit_length()))
    return [[(a, a + d) for a in range(count - d) if a // d % 2 == 0] for d in distances]


def _pair(a: int, b: int, device: torch.device) -> tuple[float, float]:
    """(seconds of a small message, bytes/s of a large one) between two ranks, which both call it: the best of several.

    Only the figures of rank `a` count.
    """
    first, peer = dist.get_rank() == a, b if dist.get_rank() == a else a
    small, large = (torch.ones(n, dtype=torch.uint8, device=device) for n in (8, NUM_BYTES[device.type]))

    def bounce(message: torch.Tensor) -> None:
        for sends in (first, not first):
            if sends:
                dist.send(message, peer)
            else:
                dist.recv(message, peer)

    bounce(small)  # connects
    latency = min(_seconds(lambda: bounce(small), device) for _ in range(BOUNCES)) / 2
    seconds = min(_seconds(lambda: bounce(large), device) for _ in range(SENDS)) / 2
    return latency, large.numel() / seconds


def _sums(machines: Sequence[str], device: torch.device) -> list[Sum]:
    """The rates of sums: over all processes, and inside each machine, of which the slowest counts."""
    names = list(dict.fromkeys(machines))
    scopes: list[tuple[str, dist.ProcessGroup | None]] = []
    if len(names) < len(machines):  # all processes make all groups
        groups = {name: dist.new_group([r for r, m in enumerate(machines) if m == name]) for name in names}
        scopes.append(("inside machines", groups[machines[dist.get_rank()]]))
    if len(names) > 1:
        scopes.append(("over all", dist.group.WORLD))
    found = []
    for scope, group in scopes:
        size = dist.get_world_size(group)
        parts = torch.ones(size * (NUM_BYTES[device.type] // 4 // size), device=device)
        one = parts[: len(parts) // size].clone()
        actions: dict[str, Callable[[], object]] = {
            "all_reduce": lambda parts=parts, group=group: dist.all_reduce(parts, group=group),  # type: ignore[misc]
            "reduce_scatter": lambda one=one, parts=parts, group=group: dist.reduce_scatter_tensor(  # type: ignore[misc]
                one, parts, group=group
            ),
        }
        for name, action in actions.items():
            if size == 1:
                seconds = 0.0
            else:
                action()  # connects
                seconds = min(_seconds(action, device) for _ in range(SUMS))
            found.append(Sum(name, scope, parts.nbytes, _latest(seconds, device)))
    return found


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _latest(seconds: float, device: torch.device) -> float:
    """The largest value of all processes."""
    value = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)
