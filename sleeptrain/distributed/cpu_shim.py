"""megatron-core without CUDA: the two places where its tensor parallel layers assume a GPU or its precision.

Its collectives allocate on `torch.cuda.current_device()`, which raises where there is no CUDA. Its cross entropy casts
logits to fp32, the widest dtype that trains on a GPU; a CPU also trains in fp64, the precision of reference runs.
Nothing else is replaced, so that its layers over gloo are the same code as over NCCL.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy


def install() -> None:
    """Makes megatron-core run on the CPU; does nothing where there is CUDA. May be called again."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = _cpu  # type: ignore[assignment]
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(_logits_max)


def _cpu() -> torch.device:
    return torch.device("cpu")


def _logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits in fp32, fp64 where they are, and their maximum over this rank's part of the vocabulary."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide, wide.amax(dim=-1)
