"""Which tensors GPU kernels compute: the one place that decides it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_everywhere = False


def runs_kernels(x: torch.Tensor) -> bool:
    """True if GPU kernels compute what depends on x: x is on CUDA, and not fp64, which kernels do not support."""
    return (x.is_cuda or _everywhere) and x.dtype != torch.float64


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let `runs_kernels` be true on every device inside.

    It is meant for fake tensors, which show shapes and costs without a GPU, and for Triton's interpreter, which runs
    the kernels on a CPU. Other CPU tensors find no kernel: an operator raises what the kernel's launch raises.
    """
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before
