"""The model over tensor parallel ranks: mixers on each rank's share of the heads, between linears of megatron-core.

S belongs to heads: each rank keeps the S of its heads and never communicates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import nn
from torch.utils.checkpoint import checkpoint

from sleeptrain.config.schema import ModelConfig
from sleeptrain.distributed.mesh import Axis
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import Hybrid, at_least_fp32, initial_weight
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.norm import GatedRMSNorm, RMSNorm
from sleeptrain.model.shards import Sharding, TensorRank, VocabularyPart
from sleeptrain.model.state import FastWeights
from sleeptrain.parallel.tensor.collectives import gather_channels, split_tokens, whole_tokens
from sleeptrain.parallel.tensor.regions import (
    ColumnLinear,
    EnteringNorm,
    GatheredLinear,
    RowLinear,
    SharedHeadLinear,
    SplitGatedRMSNorm,
    VocabularyEmbedding,
    sum_gradient,
)
from sleeptrain.parallel.tensor.sharding import ModelSharding, local_config


class TensorParallelHybrid(Hybrid):
    """One rank's share of a `Hybrid`, with the parameter names of the full model; `ModelSharding` defines the shards.

    Features and losses are equal on all ranks; states and gradients are of this rank's shards. Tokens, targets and
    layouts must be equal on all ranks. sequence: between mixers a rank holds its part of each window's tokens. Change
    device or dtype with `to`, which keeps the parameters with their hooks and attributes; a copy would lose the hooks.
    """

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        layers: range | None = None,
        sequence: bool = False,
        head_part: VocabularyPart | None = None,
    ):
        super().__init__(local_config(config, axis.size), layers, head_part)
        self.whole_config, self.sharding = config, ModelSharding(config, axis.size, head_part)
        self._axis, self._sequence = axis, sequence
        if self.embedding is not None and (head_part is None or self.layers.start == 0):
            self.embedding = VocabularyEmbedding(config.vocab_size, config.dim, axis)
        place = TensorRank(axis.rank, axis.size, partial(gather_channels, axis=axis))
        for layer in self.layers:
            block = cast(Block, self.blocks[layer])
            block.mixer = block_spec(config, layer).rank_module(self.config, place) or block.mixer
            block.mixer_norm = EnteringNorm(config, axis, sequence)
            if block.has_mlp:
                block.mlp_norm = EnteringNorm(config, axis, sequence)
            _spread_block(block, self.sharding.of_block(layer), axis, sequence)
        if self.norm is not None:
            self.norm = EnteringNorm(config, axis)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Mark the sharded parameters for megatron-core and DeepSpeed, and add hooks that sum partial gradients."""
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
        """As `Hybrid.run`: x [B, T, D] and the result hold all tokens, also with sequence parallelism."""
        first, last = options.get("first", self.layers.start), options.get("last", self.layers.stop)
        if not self._sequence or x_BTD is None or first == last:
            return super().run(x_BTD, state, *args, **options)
        y, state = super().run(split_tokens(x_BTD, self._axis), state, *args, **options)
        return (None if y is None else whole_tokens(y, self._axis, same_use=True)), state

    def fed_back(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """As `Hybrid.fed_back`: equal on all ranks. No region begins here, so the plain norm is applied."""
        if not self.config.norm_between_passes:
            return x_BTD
        assert self.norm is not None, "this part of the model has no norm"
        return RMSNorm.forward(self.norm, x_BTD)

    @property
    def vocabulary(self) -> range:
        """As in `Hybrid`, without the rows of padding."""
        first, rows = self._axis.rank * self.config.vocab_size, super().vocabulary
        start, stop = (min(first + row, self.whole_config.vocab_size) for row in (rows.start, rows.stop))
        return range(start, stop)

    def join_statistics(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """As in `Hybrid`: the ranks gather the statistics of their shards."""
        local_2N = super().join_statistics(parts)
        shards = local_2N.new_empty(self._axis.size * 2, local_2N.shape[1])
        dist.all_gather_into_tensor(shards, local_2N, group=self._axis.group)
        return super().join_statistics(shards.split(2))

    def join_logits(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._gather(super().join_logits(parts))

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The logits [N, V] over the whole vocabulary, on every rank."""
        return self._gather(self._local_logits(x_ND))

    def _read_loss(
        self, x_ND: torch.Tensor, targets_N: torch.Tensor, read: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> torch.Tensor:
        """As in `Hybrid`. Every rank reads the logits of the whole vocabulary."""
        logits = at_least_fp32(self._local_logits(x_ND))
        read(self._gather(logits), targets_N)
        return vocab_parallel_cross_entropy(logits, targets_N).sum()

    def _summed_loss(self, x_ND: torch.Tensor, targets_N: torch.Tensor, rows: int, keep: bool) -> torch.Tensor:
        """As in `Hybrid`; logits are kept only where they are held at once."""
        if keep and len(targets_N) <= rows:
            return self._loss(x_ND, targets_N)
        parts = zip(x_ND.split(rows), targets_N.split(rows), strict=True)
        return torch.stack([checkpoint(self._loss, *part, use_reentrant=False) for part in parts]).sum()

    def _loss(self, x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(at_least_fp32(self._local_logits(x_ND)), targets_N).sum()

    def _local_logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, padded vocabulary / ranks]; the padding has logit -inf and gets no gradient."""
        logits = super().logits(x_ND)
        num_local = logits.shape[-1]
        num_valid = self.whole_config.vocab_size - self._axis.rank * num_local
        if num_valid >= num_local:
            return logits
        padding = torch.arange(num_local, device=logits.device) >= num_valid
        return logits.masked_fill(padding, float("-inf"))

    def _gather(self, local_logits: torch.Tensor) -> torch.Tensor:
        logits = gather_from_tensor_model_parallel_region(local_logits, self._axis.group)
        return logits[..., : self.whole_config.vocab_size]

    def _initial_weight(self, name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor | None:
        """This rank's shard of the weight that a single process would draw."""
        shape = self.sharding[name].whole_shape(parameter.shape)
        weight = initial_weight(self.whole_config, name, shape, seed)
        return None if weight is None else self.sharding.take(name, weight, self._axis.rank)


def _spread_block(block: Block, rules: Mapping[str, Sharding], axis: Axis, sequence: bool) -> None:
    """Replace the linear layers and norms of a block by this rank's tensor parallel ones.

    rules: the sharding of each parameter, by its name in the block. sequence: outside the regions a rank holds its part
    of the tokens.
    """
    for name, part in list(block.named_modules()):
        rule = rules.get(f"{name}.weight")
        spread = None
        if isinstance(part, nn.Linear) and rule is not None:
            spread = _spread_linear(part, rule, axis, sequence)
        elif isinstance(part, GatedRMSNorm) and rule is not None and rule.dim is not None:
            assert part.gate_first, "the squares of a norm are summed over ranks where its gate acts first"
            spread = SplitGatedRMSNorm(rule.pieces[0] // axis.size, part.eps, axis)
        if spread is not None:
            block.set_submodule(name, spread)


def _spread_linear(linear: nn.Linear, rule: Sharding, axis: Axis, sequence: bool) -> nn.Module:
    """The tensor parallel layer that replaces `linear`, which has the sizes of one rank."""
    bias = linear.bias is not None
    if rule.dim == 1:  # it ends the region
        return RowLinear(linear.in_features, linear.out_features, axis, sequence)
    if rule.gathered:
        return GatheredLinear(linear.in_features, rule.pieces[0], axis)
    if rule.heads is not None and rule.heads[0] % axis.size:
        return SharedHeadLinear(linear.in_features, *rule.heads, axis, bias)
    return ColumnLinear(linear.in_features, linear.out_features, axis, bias)
