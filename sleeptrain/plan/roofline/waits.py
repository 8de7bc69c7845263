"""Operators for which the host would wait until a GPU has finished all work before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# The first read values of tensors to know a size or a scalar. `lift_fresh` is a tensor made of Python numbers, which
# would be copied to the GPU.
READS = frozenset({"nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "unique_consecutive"})
WAITS = frozenset({*READS, "lift_fresh"})
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


def makes_the_host_wait(name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """True for an operator (its packet's name) that reads a tensor back, or sends one that the host does not keep."""
    indices = args[1] if name in INDEXED else ()
    by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
    counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
    return name in WAITS or by_mask or counts
