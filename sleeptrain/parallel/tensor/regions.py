"""The modules by which features enter a tensor parallel region, are computed there, and leave it.

A region is a mixer, a feed-forward or the head. Its input is equal on all ranks. Each rank computes with its heads,
columns or vocabulary tokens, and the output is the sum over the ranks. The gradient of a region's input is summed over
ranks once, however many projections read the input. Parameters and their marks are megatron-core's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Axis
from sleeptrain.model.embedding import LookUp
from sleeptrain.model.linear import ComputeDtype, Product
from sleeptrain.model.norm import GatedRMSNorm, RMSNorm
from sleeptrain.model.shards import own_heads, padded_size
from sleeptrain.parallel.tensor.collectives import enter, gather_channels, sum_over_ranks, sum_tokens, whole_tokens


def megatron_config(axis: Axis, sequence: bool = False) -> ModelParallelConfig:
    """Configuration without initialisation: `Hybrid.init_weights` makes weights that do not depend on the layout."""
    return ModelParallelConfig(
        tensor_model_parallel_size=axis.size,
        sequence_parallel=sequence,
        perform_initialization=False,
        use_cpu_initialization=True,
    )


def sum_gradient(parameter: nn.Parameter, axis: Axis) -> None:
    """Sum a replicated parameter's gradient over the ranks in each backward: each rank has the gradient of its share.

    The hook runs once a backward on the total of all uses, before the gradient is accumulated or reduced over replicas.
    """
    parameter.register_hook(partial(_sum_over, axis.group))


def _sum_over(group: dist.ProcessGroup | None, gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class EnteringNorm(ComputeDtype, RMSNorm):
    """The norm in front of a region, whose ranks exchange tokens and gradients in the compute dtype.

    sequence: its input is this rank's part of the tokens.
    """

    def __init__(self, config: ModelConfig, axis: Axis, sequence: bool = False):
        super().__init__(config.dim, config.norm_eps, config.norm)
        self._axis, self._sequence = axis, sequence

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.narrow(super().forward(x))
        return whole_tokens(y, self._axis, same_use=False) if self._sequence else enter(y, self._axis)


class _TensorLinear(Product):
    """A linear layer of megatron-core, which multiplies in the compute dtype and by collectives that can be traced."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The weight under its name in the full model, without megatron-core's `_extra_state`."""
        state = super().state_dict(*args, **options)  # type: ignore[misc]
        state.pop(f"{options.get('prefix', '')}_extra_state", None)
        return state


class ColumnLinear(_TensorLinear, ColumnParallelLinear):
    """All channels of x -> this rank's columns of the output. The region's entry sums the gradient of x."""

    def __init__(self, in_features: int, local_features: int, axis: Axis, bias: bool = False):
        super().__init__(
            in_features,
            local_features * axis.size,
            config=megatron_config(axis),
            init_method=nn.init.zeros_,
            bias=bias,
            disable_grad_reduce=True,
            tp_group=axis.group,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight, self.bias)


class RowLinear(_TensorLinear, RowParallelLinear):
    """This rank's columns of x -> the output summed over the ranks; with `sequence`, only this rank's tokens of it."""

    def __init__(self, local_features: int, out_features: int, axis: Axis, sequence: bool = False):
        super().__init__(
            local_features * axis.size,
            out_features,
            config=megatron_config(axis, sequence),
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=axis.group,
        )
        self._axis = axis

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        y = self.product(x_BTC, self.weight)
        return sum_tokens(y, self._axis) if self.sequence_parallel else sum_over_ranks(y, self._axis)


class SharedHeadLinear(ColumnLinear):
    """The key or value projection with fewer heads than ranks: all channels of x -> the one head that this rank reads.

    Each rank stores an equal part of the rows of all heads; the ranks gather the outputs, a few channels a token.
    """

    def __init__(self, in_features: int, num_heads: int, head_dim: int, axis: Axis, bias: bool):
        super().__init__(in_features, num_heads * head_dim // axis.size, axis, bias)
        self._first = own_heads(num_heads, axis.rank, axis.size).start * head_dim
        self._head_dim, self._axis = head_dim, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        all_heads = gather_channels(super().forward(x), self._axis)
        return all_heads.narrow(-1, self._first, self._head_dim)


class GatheredLinear(ColumnLinear):
    """All channels of x -> all columns of the output; each rank computes a part and the ranks gather the parts."""

    def __init__(self, in_features: int, out_features: int, axis: Axis):
        super().__init__(in_features, out_features // axis.size, axis)
        self._axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gather_channels(super().forward(x), self._axis)


class VocabularyEmbedding(LookUp, VocabParallelEmbedding):
    """This rank's rows of the embedding matrix -> the rows of all tokens, summed over the ranks: one rank has each."""

    def __init__(self, vocab_size: int, dim: int, axis: Axis):
        super().__init__(
            padded_size(vocab_size, axis.size),
            dim,
            init_method=nn.init.zeros_,
            config=megatron_config(axis),
            tp_group=axis.group,
        )
        self._axis = axis

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        local = tokens - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        rows = self.look_up(local.masked_fill(elsewhere, 0))
        return sum_over_ranks(rows.masked_fill_(elsewhere.unsqueeze(-1), 0.0), self._axis)


class SplitGatedRMSNorm(GatedRMSNorm):
    """The gated norm of Mamba-2 over the channels of all ranks: the ranks sum the squares of their channels."""

    def __init__(self, local_dim: int, eps: float, axis: Axis):
        super().__init__(local_dim, eps, gate_first=True)
        self._axis = axis

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * F.silu(gate.to(wide.dtype))
        squares = wide.square().sum(-1, keepdim=True).contiguous()
        # Every rank divides by the sum, so the gradient of the sum is summed over the ranks (`enter`).
        total = enter(sum_over_ranks(squares, self._axis), self._axis)
        rstd = torch.rsqrt(total / (wide.shape[-1] * self._axis.size) + self.eps)
        return (wide * rstd * self.weight.to(wide.dtype)).to(x.dtype)
