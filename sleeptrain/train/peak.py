"""What the device could do at best: the denominator of MFU."""

from __future__ import annotations

import time

import torch

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets, by a part of the device's name.
_GPU_PEAKS = {
    "B300": 2250e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device: the data sheet's for a known GPU, a measured fp32 matrix product for a CPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in _GPU_PEAKS.items() if part in name), None)
    return _measured_cpu_peak()


def _measured_cpu_peak(size: int = 1024, repeats: int = 4) -> float:
    a, b = torch.ones(size, size), torch.ones(size, size)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
