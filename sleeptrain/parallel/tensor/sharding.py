"""The sharding of a full model's tensors over tensor parallel ranks: pure bookkeeping, no processes.

Every parameter is either cut or replicated. A cut parameter is cut evenly, and no element is on two ranks, even where
ranks share a key-value head or a group of Mamba-2 (then they exchange activations). So a gradient norm over all ranks
counts each element once, and joining shards does not depend on which heads a rank computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sleeptrain.checkpoint.place import Slice
from sleeptrain.config.mixers import with_mixer_settings
from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.mixers.registry import block_spec, mixer_spec, mixer_specs
from sleeptrain.model.shards import Sharding, VocabularyPart, own_heads, padded_size


class ModelSharding:
    """The sharding of a `Hybrid` over `size` ranks: of every parameter, by name, and of the memory.

    head_part: the part of the head that the ranks' pipeline stage holds, if stages share it.
    """

    def __init__(self, config: ModelConfig, size: int, head_part: VocabularyPart | None = None):
        self.config, self.size = config, size
        vocabulary = Sharding(0, (config.vocab_size,), padded=True)
        head, embeds = replace(vocabulary, part=head_part), head_part is None or head_part.index == 0
        self._by_name = {"embedding.weight": vocabulary if embeds else head, "norm.weight": Sharding()}
        if not config.tie_embeddings:
            self._by_name["head.weight"] = head
        for index in range(len(config.layers)):
            rules = _block_rules(config, index) | {
                f"mixer.{name}": rule for name, rule in block_spec(config, index).sharding().items()
            }
            self._by_name |= {f"blocks.{index}.{name}": rule for name, rule in rules.items()}

    def __getitem__(self, name: str) -> Sharding:
        return self._by_name[name]

    def of_block(self, layer: int) -> dict[str, Sharding]:
        """The sharding of a block's parameters, by their names in the block."""
        start = f"blocks.{layer}."
        return {name.removeprefix(start): rule for name, rule in self._by_name.items() if name.startswith(start)}

    def names(self) -> list[str]:
        return list(self._by_name)

    def take(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        return self[name].take(whole, rank, self.size)

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        try:
            return self[name].join(shards)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def part(self, name: str, shape: Sequence[int], rank: int) -> Slice:
        """The part of a whole parameter of this shape that a rank holds, without its padding."""
        rule = self[name]
        return Slice.cut(shape, None if rule.dim is None else {rule.dim: rule.ranges(rank, self.size)})

    def state_part(self, name: str, shape: Sequence[int], rank: int) -> Slice:
        """The part of a tensor of the whole memory that a rank holds: all rows. name: `<layer>.<field>`."""
        layer, field = name.split(".")
        if field == "S_BHKV":
            heads = shape[1] // self.size
            return Slice.cut(shape, {1: [(rank * heads, (rank + 1) * heads)]})
        if field == "conv_BWD":
            return Slice.cut(shape, {2: self._channels(self.config.layers[int(layer)]).ranges(rank, self.size)})
        if field in ("k_BLGD", "v_BLGD"):
            local = own_heads(self.config.attention.num_kv_heads, rank, self.size)
            return Slice.cut(shape, {2: [(local.start, local.stop)]})
        return Slice.cut(shape)

    def state_shape(self, name: str, local: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor of the memory with all heads, from that of a rank's part."""
        layer, field = name.split(".")
        whole = list(local)
        if field == "S_BHKV":
            whole[1] *= self.size
        elif field == "conv_BWD":
            whole[2] = sum(mixer_spec(self.config, self.config.layers[int(layer)]).conv_pieces)
        elif field in ("k_BLGD", "v_BLGD"):
            whole[2] = self.config.attention.num_kv_heads
        return tuple(whole)

    def _channels(self, kind: str) -> Sharding:
        return Sharding(2, mixer_spec(self.config, kind).conv_pieces)


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The configuration of one of `size` ranks: its heads, groups, feed-forward columns and part of the vocabulary."""
    vocab_size = padded_size(config.vocab_size, size) // size
    local = replace(config, vocab_size=vocab_size, ffn_dim=config.ffn_dim // size)
    for spec in mixer_specs(config):
        local = with_mixer_settings(local, spec.kind, spec.cut(size))
    return local


def _block_rules(config: ModelConfig, layer: int) -> dict[str, Sharding]:
    if layer in config.mixer_only:
        return {"mixer_norm.weight": Sharding()}
    columns, rows = Sharding(0, (config.ffn_dim,)), Sharding(1, (config.ffn_dim,))
    norms = ["mixer_norm", "mlp_norm", *(["mixer_post_norm", "mlp_post_norm"] if config.sandwich_norms else [])]
    return {f"{norm}.weight": Sharding() for norm in norms} | {
        "mlp.gate_proj.weight": columns,
        "mlp.up_proj.weight": columns,
        "mlp.down_proj.weight": rows,
    }
