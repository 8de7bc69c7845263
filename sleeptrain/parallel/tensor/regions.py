"""The modules through which features enter a tensor parallel region, are worked on there, and leave it.

A region is a mixer, a feed-forward or the head. Its input is the same on all ranks; each computes with its own heads,
columns or tokens of the vocabulary; the sum over the ranks is the output. The gradient of a region's input is summed
once, however many projections read it. Linear maps and collectives are megatron-core's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Axis
from sleeptrain.model.mixers.mamba2 import Mamba2
from sleeptrain.model.norm import GatedRMSNorm, RMSNorm
from sleeptrain.model.shards import own_heads


def megatron_config(axis: Axis, sequence: bool = False) -> ModelParallelConfig:
    """Weights are left to `Hybrid.init_weights`, so that they do not depend on the layout."""
    return ModelParallelConfig(
        tensor_model_parallel_size=axis.size,
        sequence_parallel=sequence,
        perform_initialization=False,
        use_cpu_initialization=True,
    )


def enter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x on every rank; its gradient is the sum of theirs."""
    y = copy_to_tensor_model_parallel_region(x, axis.group)
    if y.requires_grad:
        # megatron-core reduces in place, a copy where the gradient is not contiguous, and returns the original then.
        y.register_hook(torch.Tensor.contiguous)
    return y


def sum_gradient(parameter: nn.Parameter, axis: Axis) -> None:
    """From now on each backward adds the ranks' gradients of a parameter that all hold and each uses for its share.

    The hook runs once a backward on what all uses left together, before anything that accumulates or reduces over
    replicas sees the gradient.
    """
    parameter.register_hook(partial(_sum_over, axis.group))


def _sum_over(group: dist.ProcessGroup | None, gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def split_tokens(x_BTD: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's consecutive part of each row's tokens; the ranks' gradients are put together again."""
    return scatter_to_sequence_parallel_region(x_BTD.transpose(0, 1), axis.group).transpose(0, 1)


def whole_tokens(x_BTD: torch.Tensor, axis: Axis, same_use: bool) -> torch.Tensor:
    """The tokens of all ranks. same_use: all compute the same with them afterwards, else their gradients are summed."""
    y = gather_from_sequence_parallel_region(
        x_BTD.transpose(0, 1), tensor_parallel_output_grad=not same_use, group=axis.group
    )
    return y.transpose(0, 1)


class EnteringNorm(RMSNorm):
    """The norm in front of a region. `sequence`: its input is this rank's part of the tokens."""

    def __init__(self, config: ModelConfig, axis: Axis, sequence: bool = False):
        super().__init__(config.dim, config.norm_eps, config.norm)
        self._axis, self._sequence = axis, sequence

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return whole_tokens(y, self._axis, same_use=False) if self._sequence else enter(y, self._axis)


class _OneDtype:
    """megatron-core's product runs in the dtypes it is given; under autocast its backward would meet two of them."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
            if options.get("bias") is not None:
                options["bias"] = options["bias"].to(dtype)
        return super()._forward_impl(input, weight, *args, **options)  # type: ignore[misc]

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The weight under the name it has in a whole model, without megatron-core's `_extra_state`."""
        state = super().state_dict(*args, **options)  # type: ignore[misc]
        state.pop(f"{options.get('prefix', '')}_extra_state", None)
        return state


class ColumnLinear(_OneDtype, ColumnParallelLinear):
    """x whole -> this rank's columns. The region sums the gradient of x."""

    def __init__(self, in_features: int, own_features: int, axis: Axis, bias: bool = False):
        super().__init__(
            in_features,
            own_features * axis.size,
            config=megatron_config(axis),
            init_method=nn.init.zeros_,
            bias=bias,
            disable_grad_reduce=True,
            tp_group=axis.group,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class RowLinear(_OneDtype, RowParallelLinear):
    """This rank's columns of x -> the sum over the ranks; `sequence`: of it this rank's part of the tokens."""

    def __init__(self, own_features: int, out_features: int, axis: Axis, sequence: bool = False):
        super().__init__(
            own_features * axis.size,
            out_features,
            config=megatron_config(axis, sequence),
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=axis.group,
        )

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:  # megatron-core cuts the first dimension
            return super().forward(x_BTC.transpose(0, 1))[0].transpose(0, 1)
        return super().forward(x_BTC)[0]


class SharedHeadLinear(ColumnLinear):
    """The key or value projection where heads are fewer than ranks: x whole -> the one head that this rank reads.

    Each rank stores an equal part of all heads' rows, and the outputs are exchanged: a few channels a token.
    """

    def __init__(self, in_features: int, num_heads: int, head_dim: int, axis: Axis, bias: bool):
        super().__init__(in_features, num_heads * head_dim // axis.size, axis, bias)
        self._first = own_heads(num_heads, axis.rank, axis.size).start * head_dim
        self._head_dim, self._axis = head_dim, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = all_gather_last_dim_from_tensor_parallel_region(super().forward(x), self._axis.group)
        return whole.narrow(-1, self._first, self._head_dim)


class GatheredLinear(ColumnLinear):
    """x whole -> the columns of all ranks, of which each rank computes its own: for a layer that all channels read."""

    def __init__(self, in_features: int, out_features: int, axis: Axis):
        super().__init__(in_features, out_features // axis.size, axis)
        self._axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather_last_dim_from_tensor_parallel_region(super().forward(x), self._axis.group)


class SharedGroupMamba2(Mamba2):
    """Mamba-2 where groups are fewer than ranks: each stores equal parts of all groups' channels of B and C.

    They are convolved where they lie and then exchanged; this rank's heads read one group. `config` is the rank's own,
    with one group.
    """

    def __init__(self, config: ModelConfig, num_groups: int, axis: Axis):
        super().__init__(config)
        c = self.config
        self._num_groups, self._axis = num_groups, axis
        self._own_channels = num_groups * c.state_dim // axis.size
        self.conv_dim = self.inner_dim + 2 * self._own_channels
        self.in_proj = nn.Linear(config.dim, self.inner_dim + self.conv_dim + c.num_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, c.conv_size))
        self.conv_bias = nn.Parameter(torch.zeros(self.conv_dim))

    def split_mixed(self, mixed_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        c, axis = self.config, self._axis
        x, shared = mixed_BTC.split([self.inner_dim, 2 * self._own_channels], dim=-1)
        whole = all_gather_last_dim_from_tensor_parallel_region(shared, axis.group)
        # By rank [B part | C part] -> [B of all groups | C of all groups].
        whole = whole.unflatten(-1, (axis.size, 2, self._own_channels)).transpose(-3, -2).flatten(-2)
        group = own_heads(self._num_groups, axis.rank, axis.size).start
        B, C = whole.narrow(-1, group * c.state_dim, c.state_dim).unbind(-2)
        return x.unflatten(-1, (c.num_heads, c.head_dim)), B.unsqueeze(-2), C.unsqueeze(-2)


class SplitGatedRMSNorm(GatedRMSNorm):
    """The gated norm of Mamba-2 over all channels, of which each rank holds its part: the squares are summed."""

    def __init__(self, own_dim: int, eps: float, axis: Axis):
        super().__init__(own_dim, eps, gate_first=True)
        self._axis = axis

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * F.silu(gate.to(wide.dtype))
        squares = wide.square().sum(-1, keepdim=True).contiguous()
        # Every rank divides by the sum, so its gradient is theirs together.
        total = enter(reduce_from_tensor_model_parallel_region(squares, self._axis.group), self._axis)
        rstd = torch.rsqrt(total / (wide.shape[-1] * self._axis.size) + self.eps)
        return (wide * rstd * self.weight.to(wide.dtype)).to(x.dtype)
