"""How fast a run may be on a named GPU: a forecast from data sheets, with what it assumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.distributed.gpus import Gpu

# The share of the peak that one GPU's own work reaches, all kernels together (docs/plan.md says where it comes from).
EFFICIENCY = 0.4
GPUS_A_MACHINE = 8

ASSUMPTIONS = (
    "a GPU's own work reaches the given share of its bf16 peak (--efficiency), recomputation included",
    f"machines of {GPUS_A_MACHINE} GPUs; what crosses machines goes at the network's rate",
    "messages between stages travel while stages work; tensor and data communication does not",
    "launching kernels, reading data, evaluation and checkpoints take no time: small models are slower",
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that the process that sends most sends in a step while nobody computes.

    tensor, data: in collectives. tied: for tied embeddings. machines: of each link, whether it leaves a machine.
    """

    tensor: float
    data: float
    tied: float
    machines: dict[str, bool]


@dataclass(frozen=True)
class Speed:
    """Of a step. seconds: in all; compute, bubble, tensor, data, update: what they consist of. mfu: in 0..1, passes
    counted, recomputation not."""

    seconds: float
    compute: float
    bubble: float
    tensor: float
    data: float
    update: float
    tokens_per_second: float
    mfu: float


def leaves_machine(tensor: int, replicas: int, pipeline: int) -> dict[str, bool]:
    """Ranks are numbered tensor first, then replicas, then stages, and fill one machine after the other."""
    group = {"tensor": tensor, "data": tensor * replicas, "pipeline": tensor * replicas * pipeline}
    return {link: size > GPUS_A_MACHINE for link, size in group.items()}


@dataclass(frozen=True)
class Work:
    """Of a step. flops: model FLOPs of all processes. executed: of the busiest stage's process, recomputation and pads
    included.

    bubble: idle time over work. orthogonalised: FLOPs of Newton-Schulz on the process that does most. state: bytes that
    a process holds of weights, gradients and optimizer state, which the update reads and writes.
    """

    flops: float
    executed: float
    bubble: float
    orthogonalised: float
    state: float
    tokens: int


def forecast(gpu: Gpu, efficiency: float, processes: int, work: Work, traffic: Traffic) -> Speed:
    rate = {link: gpu.inter if far else gpu.intra for link, far in traffic.machines.items()}
    compute = work.executed / (gpu.flops * efficiency)
    tensor = traffic.tensor / rate["tensor"]
    data = traffic.data / rate["data"] + traffic.tied / rate["pipeline"]
    update = work.orthogonalised / (gpu.flops * efficiency) + 2 * work.state / gpu.bandwidth
    idle = work.bubble * (compute + tensor)
    seconds = compute + idle + tensor + data + update
    mfu = work.flops / seconds / (processes * gpu.flops)
    return Speed(seconds, compute, idle, tensor, data, update, work.tokens / seconds, mfu)


def hours(speeds: Sequence[Speed], steps: Sequence[int]) -> float:
    """Of a whole run, wall time."""
    return sum(s.seconds * n for s, n in zip(speeds, steps, strict=True)) / 3600
