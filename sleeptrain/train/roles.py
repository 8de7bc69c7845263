"""Which optimizer updates which parameter, and how fused projections fall apart into whole matrices."""

from __future__ import annotations

import torch

from sleeptrain.model.attention import Attention
from sleeptrain.model.gated_deltanet import GatedDeltaNet
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mamba2 import Mamba2
from sleeptrain.train.muon import Blocks
from sleeptrain.train.optim import ParameterRole

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
    blocks: dict[str, Blocks] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatedDeltaNet):
            blocks[f"{name}.in_proj_qkv.weight"] = _consecutive(module.key_dim, module.key_dim, module.value_dim)
        elif isinstance(module, Mamba2):
            sizes = (module.inner_dim, module.inner_dim, module.group_dim, module.group_dim, module.config.num_heads)
            blocks[f"{name}.in_proj.weight"] = _consecutive(*sizes)
        elif isinstance(module, Attention) and module.config.gate:
            c = module.config
            rows = torch.arange(c.num_heads * c.head_dim * 2).view(c.num_heads, 2, c.head_dim)
            blocks[f"{name}.q_proj.weight"] = (rows[:, 0].flatten(), rows[:, 1].flatten())
    return blocks


def _consecutive(*sizes: int) -> Blocks:
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))
