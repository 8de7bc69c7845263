"""Speed of a run: tokens and rounds per second, MFU with all passes counted, memory, remaining time."""

from __future__ import annotations

import resource
import sys
import time

import torch

from sleeptrain.sleep.step import StepResult
from sleeptrain.train.peak import peak_flops


class Pace:
    """Counts steps and computes their rates since the last `take`. Call `restart` after an evaluation to exclude it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.tokens = self.rounds = self.flops = 0
        self.clock = time.perf_counter()

    def count(self, num_tokens: int, result: StepResult) -> None:
        self.tokens += num_tokens
        self.rounds += result.num_rounds
        self.flops += result.flops

    def take(self, tokens_left: int) -> dict[str, float | None]:
        """Return the rates since the last call, in 1/s, and restart.

        tokens_left: the tokens that the run has still to see. mfu is in 0..1, None if the device's peak is unknown;
        memory_mb is in MiB; eta_seconds is None without steps.
        """
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        rate = self.tokens / seconds
        peak = peak_flops(self.device)  # a CPU's is measured at the first call, and so by the main process alone
        record = {
            "tokens_per_second": rate,
            "passes_per_second": self.rounds / seconds,
            "mfu": None if peak is None else self.flops / seconds / peak,
            "memory_mb": peak_memory_mb(self.device),
            "eta_seconds": max(tokens_left, 0) / rate if rate else None,
        }
        self.restart()
        return record


def peak_memory_mb(device: torch.device) -> float:
    """The peak memory so far in MiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**10 if sys.platform.startswith("linux") else 1  # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
