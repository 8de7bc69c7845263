"""bf16 weights under ZeRO-1: what the model computes with and ranks gather; their fp32 masters are cut over data ranks.

DeepSpeed's own bf16 mode is not used: it casts every parameter, A_log and dt_bias included. Instead it starts from fp32
weights, of which it makes its fp32 partitions, and some of its groups become bf16 afterwards. What it does in a step
fits them: an updated partition is copied into the weights, which rounds it, and the weights are gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sleeptrain.parallel.zero.partitions import require

NARROW = torch.bfloat16
_READ = ("bit16_groups_flat", "parallel_partitioned_bit16_groups", "averaged_gradients", "params_in_partition")


def are_narrow(zero: int) -> bool:
    """True if this ZeRO stage, of several processes, keeps weights in bf16 that are read in nothing wider."""
    return zero == 1


def narrow(wrapped: Any, groups: Iterable[int]) -> None:
    """Let the parameters of these groups be bf16, with fp32 gradients.

    wrapped: DeepSpeed's optimizer of ZeRO-1, which has filled its partitions. Raises LayoutError (`require`).
    """
    for name in (*_READ, "get_data_parallel_partitions", "_update_model_bit16_weights"):
        require(hasattr(wrapped, name), f"ZeRO-1 has {name}")
    for index in groups:
        flat = wrapped.bit16_groups_flat[index].to(NARROW)
        wrapped.bit16_groups_flat[index] = flat
        wrapped.parallel_partitioned_bit16_groups[index] = wrapped.get_data_parallel_partitions(flat, index)
        wrapped._update_model_bit16_weights(index)
        for p in wrapped.bit16_groups[index]:
            p.grad_dtype = torch.float32
            p._hp_mapping = None  # it holds a view of the fp32 weights


def join_norms(wrapped: Any, kinds: Sequence[str]) -> None:
    """Let DeepSpeed compute one norm for each kind of group, instead of one for each group.

    It sums each over the pipeline stages, which may have different groups: a stage in the middle has no embeddings. All
    stages have all kinds. kinds: the kind of each group.
    """
    require(hasattr(wrapped, "scaled_global_norm"), "ZeRO-1 has scaled_global_norm")
    by_kind: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    wrapped.scaled_global_norm = partial(_global_norm, wrapped, by_kind)


def _global_norm(wrapped: Any, by_kind: Mapping[str, Sequence[int]]) -> torch.Tensor:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    norms = []
    for groups in by_kind.values():
        gradients = [gradient for index in groups for gradient in wrapped.averaged_gradients[index]]
        parameters = [p for index in groups for p in wrapped.params_in_partition[index]]
        norms.append(wrapped.get_grad_norm_direct(gradients, parameters))
    return combine_grad_norm_groups(norms)
