"""How the tensors of a whole model lie on its tensor parallel ranks: pure bookkeeping, no processes.

Every parameter is either cut or held by all. A cut one is cut evenly and completely, no element lies on two ranks, even
where ranks share a key-value head or a group of Mamba-2 (they exchange its activations instead): so a gradient norm
over all ranks counts each element once, and shards join without knowing who computed with what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.state import FastWeights, LayerState, Recurrent, Retained


@dataclass(frozen=True)
class Sharding:
    """How one parameter lies on the ranks.

    dim: the dimension that is cut; None: every rank holds all. pieces: the sizes along it of what is fused there, each
    of which is cut in equal consecutive parts: a rank's shard is its part of the first piece, of the second, and so on.
    padded: zeros behind the last row make the one piece divisible. partial_gradient: every rank holds all but uses it
    for its own heads only, so that the gradient is the sum over the ranks.
    """

    dim: int | None = None
    pieces: tuple[int, ...] = ()
    padded: bool = False
    partial_gradient: bool = False

    def take(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The shard of `rank` of `size`, a view where it can be. Raises ValueError for a whole of another shape."""
        if self.dim is None:
            return whole
        if whole.shape[self.dim] != sum(self.pieces):
            raise ValueError(f"{list(whole.shape)} is not {sum(self.pieces)} long in dimension {self.dim}")
        if self.padded and (missing := -self.pieces[0] % size):
            whole = F.pad(whole, (0, 0) * (whole.dim() - 1 - self.dim) + (0, missing))
        parts = [piece.chunk(size, self.dim)[rank] for piece in whole.split(self._pieces(size), self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole, from the shards of all ranks in order. Raises ValueError where replicas differ or shapes do."""
        if self.dim is None:
            if not all(torch.equal(shards[0], other) for other in shards[1:]):
                raise ValueError("the ranks hold different values of what should be the same on all")
            return shards[0]
        sizes = [piece // len(shards) for piece in self._pieces(len(shards))]
        if any(shard.shape[self.dim] != sum(sizes) for shard in shards):
            lengths = [shard.shape[self.dim] for shard in shards]
            raise ValueError(f"shards are {lengths} long in dimension {self.dim}, expected {sum(sizes)} each")
        by_rank = [shard.split(sizes, self.dim) for shard in shards]
        whole = torch.cat([part for piece in zip(*by_rank, strict=True) for part in piece], self.dim)
        return whole.narrow(self.dim, 0, sum(self.pieces))

    def whole_shape(self, shard_shape: Sequence[int]) -> tuple[int, ...]:
        whole = list(shard_shape)
        if self.dim is not None:
            whole[self.dim] = sum(self.pieces)
        return tuple(whole)

    def _pieces(self, size: int) -> list[int]:
        pieces = [padded_size(piece, size) for piece in self.pieces] if self.padded else list(self.pieces)
        if any(piece % size for piece in pieces):
            raise ValueError(f"pieces of {pieces} cannot be cut evenly over {size} ranks")
        return pieces


class ModelSharding:
    """The sharding of every parameter of a `Hybrid`, by its name there, and of its memory, over `size` ranks."""

    def __init__(self, config: ModelConfig, size: int):
        self.config, self.size = config, size
        self._conv = {kind: pieces for kind, pieces in conv_pieces(config).items() if kind in config.layers}
        vocabulary = Sharding(0, (config.vocab_size,), padded=True)
        self._by_name = {"embedding.weight": vocabulary, "norm.weight": Sharding()}
        if not config.tie_embeddings:
            self._by_name["head.weight"] = vocabulary
        for index, kind in enumerate(config.layers):
            mixer = of_mixer(MIXER_RULES, kind, "the sharding")(config)
            rules = _block_rules(config, index) | {f"mixer.{name}": rule for name, rule in mixer.items()}
            self._by_name |= {f"blocks.{index}.{name}": rule for name, rule in rules.items()}

    def __getitem__(self, name: str) -> Sharding:
        return self._by_name[name]

    def names(self) -> list[str]:
        return list(self._by_name)

    def take(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        return self[name].take(whole, rank, self.size)

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        try:
            return self[name].join(shards)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def take_state(self, whole: FastWeights, rank: int) -> FastWeights:
        """A rank's part of the memory: its heads of S and of retained keys and values, its convolution channels."""

        def take(kind: str, state: LayerState) -> LayerState:
            if isinstance(state, Recurrent):
                tail = None if state.conv_BWD is None else self._channels(kind).take(state.conv_BWD, rank, self.size)
                return Recurrent(state.S_BHKV.chunk(self.size, 1)[rank], tail)
            if isinstance(state, Retained):
                heads = own_heads(self.config.attention.num_kv_heads, rank, self.size)
                own = slice(heads.start, heads.stop)
                return Retained(state.k_BLGD[:, :, own], state.v_BLGD[:, :, own], state.documents_BL)
            return None

        return FastWeights(tuple(take(k, s) for k, s in zip(self.config.layers, whole.layers, strict=True)))

    def join_state(self, parts: Sequence[FastWeights]) -> FastWeights:
        """The whole memory, from the parts of all ranks in order."""
        layers = zip(self.config.layers, zip(*(part.layers for part in parts), strict=True), strict=True)
        return FastWeights(tuple(self._join_layer(kind, states) for kind, states in layers))

    def _join_layer(self, kind: str, states: Sequence[LayerState]) -> LayerState:
        recurrent = [s for s in states if isinstance(s, Recurrent)]
        if recurrent:
            tails = [s.conv_BWD for s in recurrent if s.conv_BWD is not None]
            tail = self._channels(kind).join(tails) if tails else None
            return Recurrent(torch.cat([s.S_BHKV for s in recurrent], 1), tail)
        retained = [s for s in states if isinstance(s, Retained)]
        if not retained:
            return None
        num_heads = self.config.attention.num_kv_heads
        # Of the ranks that share a head, the first speaks for it.
        first = {own_heads(num_heads, rank, self.size).start: s for rank, s in reversed(list(enumerate(retained)))}
        speakers = [first[head] for head in sorted(first)]
        k, v = (torch.cat([getattr(s, name) for s in speakers], 2) for name in ("k_BLGD", "v_BLGD"))
        return Retained(k, v, retained[0].documents_BL)

    def _channels(self, kind: str) -> Sharding:
        return Sharding(2, self._conv[kind])


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The model that one of `size` ranks computes: its heads, groups, feed-forward columns, part of the vocabulary."""
    attention, gdn, mamba = config.attention, config.gated_deltanet, config.mamba2
    return replace(
        config,
        vocab_size=padded_size(config.vocab_size, size) // size,
        ffn_dim=config.ffn_dim // size,
        attention=replace(
            attention,
            num_heads=attention.num_heads // size,
            num_kv_heads=max(attention.num_kv_heads // size, 1),
        ),
        gated_deltanet=replace(gdn, num_k_heads=gdn.num_k_heads // size, num_v_heads=gdn.num_v_heads // size),
        jet=replace(config.jet, num_heads=config.jet.num_heads // size),
        mamba2=replace(mamba, num_heads=mamba.num_heads // size, num_groups=max(mamba.num_groups // size, 1)),
    )


def padded_size(size: int, parts: int) -> int:
    """The smallest multiple of `parts` that is not less than `size`."""
    return -(-size // parts) * parts


def own_heads(num_heads: int, rank: int, size: int) -> range:
    """The heads (or groups) that a rank computes with; where there are fewer than ranks, neighbours share one."""
    if num_heads % size == 0:
        return range(rank * num_heads // size, (rank + 1) * num_heads // size)
    head = rank * num_heads // size
    return range(head, head + 1)


def conv_pieces(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The channels of each recurrent mixer's convolution: [q | k | v], [v], [x | B | C]."""
    gdn, mamba = config.gated_deltanet, config.mamba2
    keys, groups = gdn.num_k_heads * gdn.head_k_dim, mamba.num_groups * mamba.state_dim
    return {
        "gated_deltanet": (keys, keys, gdn.num_v_heads * gdn.head_v_dim),
        "jet": (config.jet.num_heads * config.jet.head_v_dim,),
        "mamba2": (mamba.num_heads * mamba.head_dim, groups, groups),
    }


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


def _attention(config: ModelConfig) -> dict[str, Sharding]:
    c = config.attention
    query, keys = c.num_heads * c.head_dim, Sharding(0, (c.num_kv_heads * c.head_dim,))
    rules = {
        # Head by head [query | gate]: equal consecutive parts are whole heads with their gates.
        "q_proj.weight": Sharding(0, (query * (2 if c.gate else 1),)),
        "k_proj.weight": keys,
        "v_proj.weight": keys,
        "o_proj.weight": Sharding(1, (query,)),
    }
    if c.qkv_bias:
        rules |= {f"{name}.bias": rules[f"{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")}
    if c.qk_norm == "all":  # not cut over ranks, which `tensor_obstacles` refuses
        return rules | {"q_norm.weight": Sharding(), "k_norm.weight": Sharding()}
    norms = ("q_norm.weight", "k_norm.weight") if c.qk_norm == "head" else ()
    return rules | {name: Sharding(partial_gradient=True) for name in norms}


def _gated_deltanet(config: ModelConfig) -> dict[str, Sharding]:
    qkv = conv_pieces(config)["gated_deltanet"]
    values, heads = qkv[-1], Sharding(0, (config.gated_deltanet.num_v_heads,))
    return {
        "in_proj_qkv.weight": Sharding(0, qkv),
        "in_proj_z.weight": Sharding(0, (values,)),
        "in_proj_b.weight": heads,
        "in_proj_a.weight": heads,
        "conv_weight": Sharding(0, qkv),
        "A_log": heads,
        "dt_bias": heads,
        "norm.weight": Sharding(partial_gradient=True),
        "out_proj.weight": Sharding(1, (values,)),
    }


def _jet(config: ModelConfig) -> dict[str, Sharding]:
    c = config.jet
    (values,), heads = conv_pieces(config)["jet"], Sharding(0, (c.num_heads,))
    keys, taps = Sharding(0, (c.num_heads * c.head_k_dim,)), Sharding(0, (values,) * c.conv_size)
    return {
        "q_proj.weight": keys,
        "k_proj.weight": keys,
        "v_proj.weight": Sharding(0, (values,)),
        "kernel_in.weight": Sharding(0, (c.kernel_dim,)),
        "kernel_out.weight": taps,
        "kernel_out.bias": taps,
        "in_proj_b.weight": heads,
        "in_proj_a.weight": heads,
        "A_log": heads,
        "dt_bias": heads,
        "in_proj_z.weight": Sharding(0, (values,)),
        "norm.weight": Sharding(partial_gradient=True),
        "out_proj.weight": Sharding(1, (values,)),
    }


def _mamba2(config: ModelConfig) -> dict[str, Sharding]:
    channels, num_heads = conv_pieces(config)["mamba2"], config.mamba2.num_heads
    inner, heads = channels[0], Sharding(0, (num_heads,))
    return {
        "in_proj.weight": Sharding(0, (inner, *channels, num_heads)),
        "conv_weight": Sharding(0, channels),
        "conv_bias": Sharding(0, channels),
        "A_log": heads,
        "dt_bias": heads,
        "D": heads,
        "norm.weight": Sharding(0, (inner,)),
        "out_proj.weight": Sharding(1, (inner,)),
    }


MIXER_RULES = {
    "attention": _attention,
    "sliding_attention": _attention,
    "gated_deltanet": _gated_deltanet,
    "jet": _jet,
    "mamba2": _mamba2,
}
