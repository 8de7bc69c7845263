"""The loss of a large vocabulary as torch computes it on a GPU, on fake tensors of the CPU.

`torch.nn.functional.linear_cross_entropy` chooses its dtypes and buffers by the device of its input, and shows the
operators of its forward to no dispatch mode that sees fake tensors. Here it takes the choice of a GPU, and its forward
is run once more in view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.modules import linear_cross_entropy as chunked

FORWARD = "_linear_cross_entropy_batch_chunked_no_reduction"
_build = chunked._ChunkContext.build


class _NamedCuda(str):
    """A CPU device that says that it is a GPU."""

    type = "cuda"


def _as_on_gpu(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    shown: Any = SimpleNamespace(device=_NamedCuda("cpu"), dtype=input.dtype, shape=input.shape)
    context = _build(shown, *args, **kwargs)
    context.input = input
    return context


@contextmanager
def loss_as_on_gpu() -> Iterator[None]:
    """Let the loss of a large vocabulary choose as on a GPU."""
    chunked._ChunkContext.build = _as_on_gpu  # type: ignore[method-assign]
    try:
        yield
    finally:
        chunked._ChunkContext.build = _build  # type: ignore[method-assign]


def run_forward(input: Any, weight: Any, target: Any, bias: Any, weights: Any, ignored: int, *options: Any) -> None:
    """Run the work of the forward's operator, whose arguments these are."""
    size, policy, dtype = options
    chunked._linear_cross_entropy_batch_chunked_accumulator(
        input, weight, target, bias, weights, "none", ignored, 0.0, size, policy, dtype, False, False, False
    )
