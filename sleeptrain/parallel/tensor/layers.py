"""The model over tensor parallel ranks: the same mixers on their share of the heads, between megatron-core's linears.

S belongs to heads, so each rank keeps its own and nothing of it is ever communicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Axis
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import Hybrid, at_least_fp32, initial_weight
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.mixers.jet import Jet
from sleeptrain.model.mixers.mamba2 import Mamba2
from sleeptrain.model.norm import RMSNorm
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.tensor.regions import (
    ColumnLinear,
    EnteringNorm,
    GatheredLinear,
    RowLinear,
    SharedGroupMamba2,
    SharedHeadLinear,
    SplitGatedRMSNorm,
    megatron_config,
    split_tokens,
    sum_gradient,
    whole_tokens,
)
from sleeptrain.parallel.tensor.sharding import ModelSharding, local_config, padded_size


class TensorParallelHybrid(Hybrid):
    """One rank's share of a `Hybrid`, under the names of the whole; parameters lie as `ModelSharding` says.

    Features and losses are the same on all ranks; states and gradients are the rank's own. Tokens, targets and layouts
    must be the same on all ranks. `sequence`: between mixers a rank holds its part of each window's tokens. Change its
    device or dtype by `to`, which keeps the parameters, their hooks and attributes; a copy would lose the hooks.
    """

    def __init__(self, config: ModelConfig, axis: Axis, layers: range | None = None, sequence: bool = False):
        super().__init__(local_config(config, axis.size), layers)
        self.whole_config, self.sharding = config, ModelSharding(config, axis.size)
        self._axis, self._sequence = axis, sequence
        if self.embedding is not None:
            self.embedding = VocabParallelEmbedding(
                padded_size(config.vocab_size, axis.size),
                config.dim,
                init_method=nn.init.zeros_,
                config=megatron_config(axis),
                tp_group=axis.group,
            )
        for block in self.blocks.values():
            _spread_mixer(cast(Block, block), config, self.config, axis)
            _spread_block(cast(Block, block), self.config, axis, sequence)
        if self.norm is not None:
            self.norm = EnteringNorm(config, axis)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Tells megatron-core and DeepSpeed which parameters are cut, and sums the gradients that are partial."""
        norms = ("mixer_norm", "mixer_post_norm", "mlp_norm", "mlp_post_norm")
        token_norms = tuple(f"{norm}.weight" for norm in norms) if self._sequence else ()
        for name, parameter in self.named_parameters():
            rule = self.sharding[name]
            cut = rule.dim is not None
            if not hasattr(parameter, "tensor_model_parallel"):  # megatron-core marks its biases itself
                set_tensor_model_parallel_attributes(parameter, cut, rule.dim if cut else -1, 1)
            if rule.partial_gradient or name.endswith(token_norms):
                sum_gradient(parameter, self._axis)

    def run(
        self, x_BTD: torch.Tensor | None, state: FastWeights, *args: Any, **options: Any
    ) -> tuple[torch.Tensor | None, FastWeights]:
        """As `Hybrid.run`; features are whole outside. With sequence parallelism they are split between mixers."""
        first, last = options.get("first", self.layers.start), options.get("last", self.layers.stop)
        if not self._sequence or x_BTD is None or first == last:
            return super().run(x_BTD, state, *args, **options)
        y, state = super().run(split_tokens(x_BTD, self._axis), state, *args, **options)
        return (None if y is None else whole_tokens(y, self._axis, same_use=True)), state

    def fed_back(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """As `Hybrid.fed_back`: the same on all ranks, no region begins here."""
        if not self.config.norm_between_passes:
            return x_BTD
        assert self.norm is not None, "this part of the model has no norm"
        return RMSNorm.forward(self.norm, x_BTD)

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The logits over the whole vocabulary, on every rank."""
        return self._gather(self._own_logits(x_ND))

    def cross_entropy(
        self, x_ND: torch.Tensor, targets_N: torch.Tensor, read_logits: Callable[[torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """As `Hybrid.cross_entropy`; without `read_logits` no rank sees more than its part of the vocabulary."""
        logits = at_least_fp32(self._own_logits(x_ND))
        if read_logits is not None:
            read_logits(self._gather(logits))
        return vocab_parallel_cross_entropy(logits, targets_N).sum()

    def _own_logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, padded vocabulary / ranks]; the padding cannot be predicted and gets no gradient."""
        logits = super().logits(x_ND)
        num_own = logits.shape[-1]
        num_valid = self.whole_config.vocab_size - self._axis.rank * num_own
        if num_valid >= num_own:
            return logits
        padding = torch.arange(num_own, device=logits.device) >= num_valid
        return logits.masked_fill(padding, float("-inf"))

    def _gather(self, own_logits: torch.Tensor) -> torch.Tensor:
        whole = gather_from_tensor_model_parallel_region(own_logits, self._axis.group)
        return whole[..., : self.whole_config.vocab_size]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The shards of exactly those weights that one process would draw."""
        for name, parameter in self.named_parameters():
            shape = self.sharding[name].whole_shape(parameter.shape)
            weight = initial_weight(self.whole_config, name, shape, seed)
            if weight is not None:
                parameter.copy_(self.sharding.take(name, weight, self._axis.rank))


def _spread_mixer(block: Block, whole: ModelConfig, own: ModelConfig, axis: Axis) -> None:
    """Where key-value heads or groups are fewer than ranks, and where a norm spans all heads, ranks must exchange."""
    mixer = block.mixer
    if isinstance(mixer, Mamba2):
        if whole.mamba2.num_groups % axis.size:
            mixer = block.mixer = SharedGroupMamba2(own, whole.mamba2.num_groups, axis)
        mixer.norm = SplitGatedRMSNorm(mixer.inner_dim, own.norm_eps, axis)
    elif isinstance(mixer, Jet):
        mixer.kernel_in = GatheredLinear(whole.dim, whole.jet.kernel_dim, axis)
    elif isinstance(mixer, Attention) and whole.attention.num_kv_heads % axis.size:
        c = whole.attention
        mixer.k_proj = SharedHeadLinear(whole.dim, c.num_kv_heads, c.head_dim, axis, c.qkv_bias)
        mixer.v_proj = SharedHeadLinear(whole.dim, c.num_kv_heads, c.head_dim, axis, c.qkv_bias)


def _spread_block(block: Block, own: ModelConfig, axis: Axis, sequence: bool) -> None:
    """The norms that open a region, and the linears inside: those that end it sum over the ranks."""
    block.mixer_norm = EnteringNorm(own, axis, sequence)
    if block.has_mlp:
        block.mlp_norm = EnteringNorm(own, axis, sequence)
    for part in (block.mixer, *([block.mlp] if block.has_mlp else [])):
        for name, linear in list(part.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            if name in ("o_proj", "out_proj", "down_proj"):
                setattr(part, name, RowLinear(linear.in_features, linear.out_features, axis, sequence))
            else:
                setattr(
                    part, name, ColumnLinear(linear.in_features, linear.out_features, axis, linear.bias is not None)
                )
