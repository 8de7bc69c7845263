"""Checkpoints, a resume and a step's links at many processes, computed from the shapes of a model and a layout.

"Before" are earlier states of this code: a checkpoint in which one process wrote each tensor as a whole; a resume in
which each process read all elements of its shard; gradients summed whole by an all-reduce, then gathered weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks import Row
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.distributed.descriptors import descriptors_needed
from sleeptrain.optim.optimizers import STATE
from sleeptrain.parallel.zero.matrix_exchange import assign_owners
from sleeptrain.plan.links import sent_bytes
from sleeptrain.plan.parameters import WIDE, Held, partition_size, role_groups
from sleeptrain.plan.planner import Planner

EXPERIMENT, VOCABULARY, TENSOR, ROWS = "pretrain_7b", 65536, 2, 2  # two tensor ranks, two rows for each replica
ZERO = 1
ONE_PASS = ("sleep.passes=1", "sleep.curriculum=[]")
SIZES = (32, 256, 1024, 4096)
GIB, TB = 2**30, 1e12
# Exchanges of a step over all processes, and before values were joined and small sums had an algorithm of their own.
EXCHANGES, EARLIER_EXCHANGES = 1, 4
# Assumed for a message of gloo between two machines, with what Python does for it. gloo's own rings are quicker.
MESSAGE_MS, RING_MESSAGE_MS = 0.5, 0.05


class _Loads(NamedTuple):
    """Bytes by process: all together, and of the fullest process."""

    total: float
    fullest: float

    def over_mean(self, size: int) -> float:
        return self.fullest / (self.total / size)


def rows() -> list[Row]:
    config = compose(
        [
            f"experiment={EXPERIMENT}",
            "run.name=counted",
            f"parallel.tensor={TENSOR}",
            f"parallel.zero={ZERO}",
            *ONE_PASS,
        ]
    )
    config.model.vocab_size = VOCABULARY
    planner = Planner(None, None)
    [held] = planner.held(config)
    return [row for size in SIZES for row in _rows(config, planner, held, size)]


def _rows(config: Config, planner: Planner, held: Sequence[Held], size: int) -> list[Row]:
    replicas, checkpoint = size // TENSOR, sum(_elements(h) * (1 + _averages(h)) for h in held) * WIDE
    drawn = _owned({h.name: WIDE * _elements(h) for h in held}, replicas)
    written, written_before = _written(held, replicas), _owned(_tensors(held), size)
    read, read_before = _read(held, replicas), checkpoint / TENSOR * size
    messages, earlier = EXCHANGES * (size - 1).bit_length(), EARLIER_EXCHANGES * 2 * (size - 1)
    return [
        _row(size, "open files that rank 0 needs", descriptors_needed(size), "", 65536),
        _row(size, "all with all: sockets of a process", 2 * (size - 1), ""),
        _row(size, "messages in a row, a step", messages, "", 16),
        _row(size, "by gloo's rings: messages in a row, a step", earlier, ""),
        _row(size, "exchange of a step, at 0.5 ms a message", messages * MESSAGE_MS, "ms", 20),
        _row(size, "by gloo's rings: exchanges of a step, at 0.05 ms a message", earlier * RING_MESSAGE_MS, "ms"),
        _row(size, "drawn by a process", drawn.fullest / GIB, "GiB", drawn.total / GIB / 8),
        _row(size, "drawn by a process alone", drawn.total / GIB, "GiB"),
        _row(size, "checkpoint: files of tensors", size, "", size),
        _row(size, "checkpoint: fullest process over the mean", written.over_mean(size), "", 1.1),
        _row(size, "by whole tensors: fullest process over the mean", written_before.over_mean(size), ""),
        _row(size, "checkpoint: written by the fullest process", written.fullest / GIB, "GiB"),
        _row(size, "resume: read in all, checksums included", read.total / TB, "TB", 2.1 * checkpoint / TB),
        _row(size, "each its shard: read in all", read_before / TB, "TB"),
        _row(size, "resume: read by the fullest process", read.fullest / GIB, "GiB", checkpoint / TENSOR / GIB / 4),
        _row(size, "each its shard: read by a process", read_before / size / GIB, "GiB"),
        *_links(config, planner, held, replicas, size),
    ]


def _row(size: int, name: str, value: float, unit: str, goal: float | None = None) -> Row:
    return Row(f"{size} processes: {name}", value, unit, goal, "lower")


def _elements(h: Held) -> int:
    """Elements of the full parameter."""
    numel = 1
    for extent in h.shape:
        numel *= extent
    return numel


def _averages(h: Held) -> int:
    return len(STATE[h.role.kind] - {"step"})


def _tensors(held: Sequence[Held]) -> dict[str, float]:
    """Bytes of each tensor of a checkpoint: weights and optimizer state."""
    return {f"{h.name}/{n}": WIDE * _elements(h) for h in held for n in range(1 + _averages(h))}


def _owned(sizes: Mapping[str, float], num_ranks: int) -> _Loads:
    """Whole tensors, each with one owner."""
    loads = [0.0] * num_ranks
    for name, owner in assign_owners(sizes, num_ranks).items():
        loads[owner] += sizes[name]
    return _Loads(sum(loads), max(loads))


def _written(held: Sequence[Held], replicas: int) -> _Loads:
    """A checkpoint of ZeRO's partitions: each process writes its own, and a share of what all tensor ranks hold."""
    total = fullest = 0.0
    for group in role_groups(held, ZERO):
        copies = WIDE * (1 + _averages(group[0]))
        total += copies * sum(map(_elements, group))
        # A partition that holds nothing but split parameters writes all of it.
        fullest += copies * partition_size(group, replicas)
    return _Loads(total, fullest)


def _read(held: Sequence[Held], replicas: int) -> _Loads:
    """A resume: checksums of all files, and each process's own part of the weights and optimizer state."""
    written = _written(held, replicas)
    state = [(WIDE * (1 + _averages(g[0])), partition_size(g, replicas)) for g in role_groups(held, ZERO)]
    own = sum(width * part for width, part in state)
    everyone = sum(WIDE * (1 + _averages(h)) * h.numel for h in held)
    return _Loads(written.total + TENSOR * everyone, written.fullest + own)


def _links(config: Config, planner: Planner, held: Sequence[Held], replicas: int, size: int) -> list[Row]:
    """Bytes that a process sends in a step of one pass, with two rows for each replica."""
    config = replace(config, data=replace(config.data, batch=ROWS * replicas))
    [work] = planner.workloads(config, replicas)
    [data], [tensor] = planner.data(config, work), planner.tensor(config, work)
    summed = sent_bytes(data.reduce, replicas) + sent_bytes(data.gather, replicas)
    before = 3 * WIDE * sum(h.numel for h in held) * (replicas - 1) / replicas
    inside = sent_bytes(tensor.total, TENSOR)
    return [
        _row(size, "a step, data link: gradients and weights, sent", summed / GIB, "GiB", 0.51 * before / GIB),
        _row(size, "all-reduce and gather in fp32: gradients and weights, sent", before / GIB, "GiB"),
        _row(size, "a step, data link: Muon's matrices, sent by the fullest", data.exchange / GIB, "GiB"),
        _row(size, "a step, tensor link, sent", inside / GIB, "GiB"),
    ]
