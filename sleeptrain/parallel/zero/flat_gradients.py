"""The gradients of ZeRO-1: one flat fp32 tensor for each group of parameters, summed over data ranks once a step.

A rank receives the sum of the partition that it updates (reduce-scatter), half of the bytes of DeepSpeed's sum, which
every rank receives in full. Where the state is cut over some of the replicas only (`parallel.shard_replicas`), the
ranks of other groups that update the same partition then add theirs (all-reduce). From there on DeepSpeed goes on as
after its own sum: norm, clipping, update, gather.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from sleeptrain.distributed.mesh import Axis
from sleeptrain.parallel.zero.partitions import require

_READ = ("bit16_groups_flat", "round_robin_bit16_groups", "round_robin_bit16_offsets", "averaged_gradients")


class FlatGradients:
    """The gradient of each parameter is a view of its group's flat tensor, at the place of the weight in DeepSpeed's.

    tensors: the flat tensors.
    """

    def __init__(self, wrapped: Any, shard: Axis, copies: Axis):
        """wrapped: DeepSpeed's optimizer of ZeRO-1. shard, copies: as in `Mesh`. Raises LayoutError (`require`)."""
        for name in (*_READ, "_grad_acc_hooks", "_build_compact_grad_partition_buffer"):
            require(hasattr(wrapped, name), f"ZeRO-1 has {name}")
        for hook in wrapped._grad_acc_hooks:
            hook.remove()  # they do nothing but cost time in each backward
        wrapped._grad_acc_hooks.clear()
        self._wrapped, self._shard, self._copies = wrapped, shard, copies
        self.tensors = [torch.zeros_like(flat, dtype=torch.float32) for flat in wrapped.bit16_groups_flat]
        self._views: dict[torch.nn.Parameter, torch.Tensor] = {}
        places = zip(self.tensors, wrapped.round_robin_bit16_groups, wrapped.round_robin_bit16_offsets, strict=True)
        for flat, parameters, offsets in places:
            for p, offset in zip(parameters, offsets, strict=True):
                self._views[p] = flat[offset : offset + p.numel()].view(p.shape)
        self.clear()

    def clear(self) -> None:
        """Set all gradients to zero."""
        torch._foreach_zero_(self.tensors)
        for p, view in self._views.items():
            p.grad = view

    def drop(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Set the gradients of these parameters to zero."""
        for p in parameters:
            self._views[p].zero_()

    def sum(self) -> None:
        """Sum the gradients over the data ranks, and hand each rank's partition to DeepSpeed's optimizer."""
        for index, flat in enumerate(self.tensors):
            partition = self._wrapped._build_compact_grad_partition_buffer(index)
            dist.reduce_scatter_single(partition.flat_partition, flat, group=self._shard.group)
            if self._copies.size > 1:
                dist.all_reduce(partition.flat_partition, group=self._copies.group)
            self._wrapped.averaged_gradients[index] = partition
