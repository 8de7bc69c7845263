"""Forecast the speed of a run on a GPU from data sheets, with the assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.distributed.gpus import Gpu
from sleeptrain.plan.links import LINK_SHARES

GPUS_A_MACHINE = 8

ASSUMPTIONS = (
    "a GPU's own work reaches a share of its bf16 peak, recomputation included: named (--efficiency), or counted from "
    "the operators of a round and what GPUs reach of their data sheets, not measured",
    f"machines of {GPUS_A_MACHINE} GPUs; links reach {LINK_SHARES.inside:.0%} of their rate inside a machine and "
    f"{LINK_SHARES.between:.0%} between machines, and a hop of a collective takes {LINK_SHARES.hop_inside * 1e6:.2g} "
    f"us inside and {LINK_SHARES.hop_between * 1e6:.2g} us between, not measured",
    "messages between stages travel while stages work; tensor and data communication does not",
    "where the share is counted, PyTorch needs 7.5 us of the host for an operator; reading data, evaluation and "
    "checkpoints take no time",
)


@dataclass(frozen=True)
class Traffic:
    """Seconds of a step that the busiest process spends in collectives, without overlap with compute.

    tensor: between tensor ranks. data: between replicas, and for tied embeddings.
    """

    tensor: float
    data: float


@dataclass(frozen=True)
class Speed:
    """The speed of a step.

    seconds: of the step, the sum of compute, bubble, tensor, data and update, all in seconds.
    mfu: model FLOPs utilisation, 0..1: all passes counted, recomputation not.
    """

    seconds: float
    compute: float
    bubble: float
    tensor: float
    data: float
    update: float
    tokens_per_second: float
    mfu: float


def leaves_machine(tensor: int, replicas: int, pipeline: int, shard: int | None = None) -> dict[str, bool]:
    """For each link: True if it leaves a machine. Ranks count tensor first, then replicas, then pipeline stages.

    shard: the neighbouring replicas over which state is cut; None: all.
    """
    group = {"tensor": tensor, "shard": tensor * (shard or replicas), "data": tensor * replicas}
    group |= {"pipeline": tensor * replicas * pipeline}
    return {link: size > GPUS_A_MACHINE for link, size in group.items()}


@dataclass(frozen=True)
class Work:
    """The work of a step.

    flops: model FLOPs of all processes.
    executed: FLOPs of a process of the busiest stage, recomputation and pads included.
    bubble: idle time over busy time.
    orthogonalised: FLOPs of Newton-Schulz on the process with the most.
    state: bytes of weights, gradients and optimizer state of a process, which the update reads and writes.
    tokens: of all processes.
    """

    flops: float
    executed: float
    bubble: float
    orthogonalised: float
    state: float
    tokens: int


def forecast(
    gpu: Gpu, efficiency: float, processes: int, work: Work, traffic: Traffic, products: float | None = None
) -> Speed:
    """The speed of a step.

    efficiency: share of the GPU's peak, 0..1. products: that of Newton-Schulz, which is wide products; None: the same.
    """
    compute = work.executed / (gpu.flops * efficiency)
    tensor, data = traffic.tensor, traffic.data
    update = work.orthogonalised / (gpu.flops * (products or efficiency)) + 2 * work.state / gpu.bandwidth
    idle = work.bubble * (compute + tensor)
    seconds = compute + idle + tensor + data + update
    mfu = work.flops / seconds / (processes * gpu.flops)
    return Speed(seconds, compute, idle, tensor, data, update, work.tokens / seconds, mfu)


def hours(speeds: Sequence[Speed], steps: Sequence[int]) -> float:
    """Wall time of a run. steps: number of steps at each speed."""
    return sum(s.seconds * n for s, n in zip(speeds, steps, strict=True)) / 3600
