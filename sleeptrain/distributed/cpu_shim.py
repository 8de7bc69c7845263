"""Runs megatron-core without CUDA: replaces two functions of its tensor parallel layers that assume a GPU.

Its collectives allocate on `torch.cuda.current_device()`, which raises without CUDA. Its cross entropy casts logits to
fp32, the widest dtype that trains on a GPU; a CPU also trains in fp64, the precision of reference runs. Everything else
stays: its layers run the same code over gloo as over NCCL.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy


def install() -> None:
    """Makes megatron-core run on the CPU; does nothing if CUDA is available. A second call is harmless."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = _cpu  # type: ignore[assignment]
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(_logits_max)


def _cpu() -> torch.device:
    return torch.device("cpu")


def _logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits in fp32 (fp64 if they are fp64), and their maximum over this rank's part of the vocabulary."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide, wide.amax(dim=-1)
