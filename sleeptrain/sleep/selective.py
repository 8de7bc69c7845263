"""Selective recomputation: what a checkpointed block keeps so that only its cheap operations run again.

It keeps the results of operations that cost much and are small: matrix products, attention, the recurrences' operators
on a GPU, and the collectives between tensor ranks. Norms, convolutions, gates, SwiGLU, casts and rotations run again.
On a CPU a recurrence is many small batched products whose results are larger than all else that a block keeps; they
run again too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Names, since an operator exists only where its module is loaded.
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
        "sleeptrain::gated_delta_rule",
        "sleeptrain::gated_linear_attention",
    }
)

# Collectives that write into an argument: the places of the tensors they write and of their group.
_COLLECTIVES = {"c10d::allreduce_": (0, 1), "c10d::_allgather_base_": (0, 2), "c10d::_reduce_scatter_base_": (0, 2)}

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def selective_contexts(group_name: str | None) -> Contexts:
    """The contexts of a checkpointed block's forward and of its rerun (`context_fn` of torch's `checkpoint`).

    group_name: of the tensor ranks that share the block; None: the block has no collectives.
    """
    forward, rerun = create_selective_checkpoint_contexts(_policy)
    if group_name is None:
        return forward, rerun
    results: list[_Result] = []
    # torch's modes are inside, so that they do not see the copies of `_Replay`.
    return _both(_Keep(group_name, results), forward), _both(_Replay(group_name, results), rerun)


def contexts_of(block: object) -> Callable[[], Contexts]:
    """`context_fn` for a block, by its `tensor_group`."""
    return partial(selective_contexts, getattr(block, "tensor_group", None))


def _policy(_: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


# The tensors that a collective wrote, and what its call returned.
_Result = tuple[list[torch.Tensor], Any]


class _Collectives(TorchDispatchMode):
    """Sees the collectives of one group. torch's selective checkpoint cannot keep them: they write into arguments.

    results: of the collectives in the forward, in their order.
    """

    def __init__(self, group_name: str, results: list[_Result]) -> None:
        super().__init__()
        self._group_name, self._results = group_name, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written, group = _COLLECTIVES.get(func.name(), (0, None))
        if group is None or dist.ProcessGroup.unbox(args[group]).group_name != self._group_name:
            return func(*args, **(kwargs or {}))
        tensors = args[written] if isinstance(args[written], list) else [args[written]]
        return self._run(tensors, partial(func, *args, **(kwargs or {})))

    def _run(self, tensors: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        raise NotImplementedError


class _Keep(_Collectives):
    """In the forward: keeps the results."""

    def _run(self, tensors: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        returned = call()
        self._results.append(([t.detach() for t in tensors], returned))
        return returned


class _Replay(_Collectives):
    """In the rerun: copies the results that were kept, and sends nothing."""

    def _run(self, tensors: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        results, returned = self._results.pop(0)
        for target, kept in zip(tensors, results, strict=True):
            # A sum over ranks replaced the product in place, so the product that was kept is the sum already.
            if target.data_ptr() != kept.data_ptr():
                target.copy_(kept)
        return returned
