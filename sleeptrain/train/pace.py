"""How fast a run goes: tokens and rounds a second, MFU with passes counted, memory, time left."""

from __future__ import annotations

import resource
import sys
import time

import torch

from sleeptrain.sleep.step import StepResult
from sleeptrain.train.peak import peak_flops


class Pace:
    """Adds up steps and tells their rates since it was last asked. Evaluation does not count: `restart` behind it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = peak_flops(device)
        self.restart()

    def restart(self) -> None:
        self.tokens = self.rounds = self.flops = 0
        self.clock = time.perf_counter()

    def count(self, num_tokens: int, result: StepResult) -> None:
        self.tokens += num_tokens
        self.rounds += result.num_rounds
        self.flops += result.flops

    def take(self, tokens_left: int) -> dict[str, float | None]:
        """Rates since the last call, in 1/s; mfu in 0..1 (None where the device's peak is not known)."""
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        rate = self.tokens / seconds
        record = {
            "tokens_per_second": rate,
            "passes_per_second": self.rounds / seconds,
            "mfu": None if self.peak is None else self.flops / seconds / self.peak,
            "memory_mb": peak_memory_mb(self.device),
            "eta_seconds": max(tokens_left, 0) / rate if rate else None,
        }
        self.restart()
        return record


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, MiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilo = 2**10 if sys.platform.startswith("linux") else 1  # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**20
