"""Which optimizer updates which parameter, and how fused projections fall apart into whole matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from sleeptrain.config.mixers import of_mixer
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.mixers.gated_deltanet import GatedDeltaNet
from sleeptrain.model.mixers.mamba2 import Mamba2
from sleeptrain.optim.muon import Blocks
from sleeptrain.optim.optimizers import ParameterRole

# Small per-head gates, which are no feature maps of their own.
_GATES = ("in_proj_a.weight", "in_proj_b.weight")


def parameter_roles(model: Hybrid) -> dict[str, ParameterRole]:
    """Body matrices by Muon, split where a projection is fused; embeddings, head, norms, convolutions, decays by AdamW.

    Weight decay acts on matrices only: a decayed zero-centred norm, decay rate or bias would be pulled to a value that
    means something.
    """
    blocks = _fused_blocks(model)
    roles = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith("conv_weight")
        if is_matrix and name.startswith("blocks.") and not name.endswith(_GATES):
            roles[name] = ParameterRole("muon", True, blocks.get(name))
        else:
            roles[name] = ParameterRole("adamw", is_matrix, None)
    return roles


def _fused_blocks(model: Hybrid) -> dict[str, Blocks]:
    """Of the projections that are fused, the rows of each matrix."""
    blocks: dict[str, Blocks] = {}
    for layer, block in model.blocks.items():
        fused = of_mixer(_FUSED, model.config.layers[int(layer)], "the matrices")(cast(Block, block).mixer)
        blocks |= {f"blocks.{layer}.mixer.{name}.weight": rows for name, rows in fused.items()}
    return blocks


def _attention(mixer: Attention) -> dict[str, Blocks]:
    c = mixer.config
    if not c.gate:
        return {}
    rows = torch.arange(c.num_heads * c.head_dim * 2).view(c.num_heads, 2, c.head_dim)
    return {"q_proj": (rows[:, 0].flatten(), rows[:, 1].flatten())}


def _gated_deltanet(mixer: GatedDeltaNet) -> dict[str, Blocks]:
    return {"in_proj_qkv": _consecutive(mixer.key_dim, mixer.key_dim, mixer.value_dim)}


def _mamba2(mixer: Mamba2) -> dict[str, Blocks]:
    sizes = (mixer.inner_dim, mixer.inner_dim, mixer.group_dim, mixer.group_dim, mixer.config.num_heads)
    return {"in_proj": _consecutive(*sizes)}


_FUSED: dict[str, Callable[[Any], dict[str, Blocks]]] = {
    "attention": _attention,
    "sliding_attention": _attention,
    "gated_deltanet": _gated_deltanet,
    "jet": lambda _: {},
    "mamba2": _mamba2,
}


def _consecutive(*sizes: int) -> Blocks:
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))
