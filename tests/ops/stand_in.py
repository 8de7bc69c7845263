"""Operators without their kernels: results of zeros with the right shapes, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class ZerosForKernels(TorchDispatchMode):
    """Inside, the operators of `sleeptrain.ops` and torch's `varlen_attn` return zeros in place of kernels' results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # CPUs have no product with another dtype for the sums.
        if func.namespace not in ("sleeptrain", "torch_attn") and func is not torch.ops.aten.mm.dtype:
            return func(*args, **(kwargs or {}))
        with FakeTensorMode() as mode:
            results = func(*tree_map_only(torch.Tensor, mode.from_tensor, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), results)
