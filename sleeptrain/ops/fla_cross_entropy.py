"""The cross entropy of logits by flash-linear-attention's kernels, as operators of torch. They compute in fp32."""

from __future__ import annotations

import torch

from sleeptrain.ops.fla_package import from_fla, on_its_device

CROSS_ENTROPY = "fla.modules.fused_cross_entropy.ops"


@torch.library.custom_op("sleeptrain::cross_entropy", mutates_args=())
@on_its_device
def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss of each row, the logarithm of its sum of exponentials), fp32 [N].

    logits: [N, V], each row contiguous; targets: int64 [N], below V.
    """
    losses, _, lse, *_ = from_fla(CROSS_ENTROPY, "cross_entropy_fwd")(logits, targets)
    return losses, lse


@cross_entropy.register_fake
def _(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses, lse = (logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(2))
    return losses, lse


@torch.library.custom_op("sleeptrain::cross_entropy_backward", mutates_args=("logits",))
@on_its_device
def cross_entropy_backward(
    logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, dlosses: torch.Tensor
) -> None:
    """Replace logits by their gradients. lse: as `cross_entropy` returns it; dlosses: fp32 [N]."""
    from_fla(CROSS_ENTROPY, "cross_entropy_bwd")(logits, targets, lse, dlosses, inplace_backward=True)


@cross_entropy_backward.register_fake
def _(logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, dlosses: torch.Tensor) -> None:
    return None
