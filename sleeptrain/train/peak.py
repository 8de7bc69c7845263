"""The device's peak FLOP/s: the denominator of MFU."""

from __future__ import annotations

import time
from functools import cache

import torch

from sleeptrain.distributed.gpus import GPUS, Gpu


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device: from the data sheet of a known GPU (else None), measured by fp32 products on a CPU."""
    if device.type == "cuda":
        gpu = gpu_of(device)
        return None if gpu is None else gpu.flops
    return _measured_cpu_peak()


def gpu_of(device: torch.device) -> Gpu | None:
    """The data sheet of the device; None for a CPU and for a GPU that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


@cache
def _measured_cpu_peak(size: int = 1024, repeats: int = 4) -> float:
    a, b = torch.ones(size, size), torch.ones(size, size)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
