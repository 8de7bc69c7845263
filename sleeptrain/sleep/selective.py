"""Selective recomputation: what a checkpointed block keeps so that only its cheap operations run again.

It keeps the results of operations that cost much and are small: matrix products, attention, the recurrences' operators
on a GPU, and the collectives between tensor ranks. Norms, convolutions, gates, SwiGLU, casts and rotations run again.
On a CPU a recurrence is many small batched products whose results are larger than all else that a block keeps; they
run again too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

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
        "_c10d_functional::all_reduce",
        "_c10d_functional::all_gather_into_tensor",
        "_c10d_functional::reduce_scatter_tensor",
    }
)

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def selective_contexts() -> Contexts:
    """The contexts of a checkpointed block's forward and of its rerun (`context_fn` of torch's `checkpoint`)."""
    contexts: Contexts = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(_: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
