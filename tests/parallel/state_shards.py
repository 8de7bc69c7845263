"""The memory of tensor ranks, cut and joined by tensors: a second writing of `ModelSharding.state_part`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.shards import Sharding, own_heads
from sleeptrain.model.state import FastWeights, LayerState, Recurrent, Retained
from sleeptrain.parallel.tensor.sharding import ModelSharding


def take_state(sharding: ModelSharding, whole: FastWeights, rank: int) -> FastWeights:
    """A rank's part of the memory: its heads of S, its retained keys and values, its convolution channels."""
    size = sharding.size

    def take(kind: str, state: LayerState) -> LayerState:
        if isinstance(state, Recurrent):
            tail = None if state.conv_BWD is None else channels(sharding, kind).take(state.conv_BWD, rank, size)
            return Recurrent(state.S_BHKV.chunk(size, 1)[rank], tail)
        if isinstance(state, Retained):
            heads = own_heads(sharding.config.attention.num_kv_heads, rank, size)
            local = slice(heads.start, heads.stop)
            return Retained(state.k_BLGD[:, :, local], state.v_BLGD[:, :, local], state.documents_BL)
        return None

    return FastWeights(tuple(take(k, s) for k, s in zip(sharding.config.layers, whole.layers, strict=True)))


def join_state(sharding: ModelSharding, parts: Sequence[FastWeights]) -> FastWeights:
    """The memory of all heads. parts: one of each rank, in order."""
    layers = zip(sharding.config.layers, zip(*(part.layers for part in parts), strict=True), strict=True)
    return FastWeights(tuple(join_layer(sharding, kind, states) for kind, states in layers))


def join_layer(sharding: ModelSharding, kind: str, states: Sequence[LayerState]) -> LayerState:
    recurrent = [s for s in states if isinstance(s, Recurrent)]
    if recurrent:
        tails = [s.conv_BWD for s in recurrent if s.conv_BWD is not None]
        tail = channels(sharding, kind).join(tails) if tails else None
        return Recurrent(torch.cat([s.S_BHKV for s in recurrent], 1), tail)
    retained = [s for s in states if isinstance(s, Retained)]
    if not retained:
        return None
    num_heads = sharding.config.attention.num_kv_heads
    # Ranks that share a head hold equal copies of it: take the first rank's.
    first = {own_heads(num_heads, rank, sharding.size).start: s for rank, s in reversed(list(enumerate(retained)))}
    by_head = [first[head] for head in sorted(first)]
    k, v = (torch.cat([getattr(s, name) for s in by_head], 2) for name in ("k_BLGD", "v_BLGD"))
    return Retained(k, v, retained[0].documents_BL)


def channels(sharding: ModelSharding, kind: str) -> Sharding:
    return Sharding(2, mixer_spec(sharding.config, kind).conv_pieces)
