"""Which optimizer updates which parameter, and how fused projections fall apart into whole matrices."""

from __future__ import annotations

import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.optim.optimizers import ParameterRole


def parameter_roles(model: Hybrid) -> dict[str, ParameterRole]:
    """Body matrices by Muon, split where a projection is fused; embeddings, head, norms, convolutions, decays by AdamW.

    Weight decay acts on matrices only: a decayed zero-centred norm, decay rate or bias would be pulled to a value that
    means something.
    """
    return {name: _role(model, name, parameter) for name, parameter in model.named_parameters()}


def _role(model: Hybrid, name: str, parameter: torch.Tensor) -> ParameterRole:
    is_matrix = parameter.dim() == 2
    if not name.startswith("blocks."):
        return ParameterRole("adamw", is_matrix, None)
    block, _, own = name.removeprefix("blocks.").partition(".mixer.")
    if not own:  # of the feed-forward, or a norm
        return ParameterRole("muon" if is_matrix else "adamw", is_matrix, None)
    spec = block_spec(model.config, int(block))
    is_matrix = is_matrix and own not in spec.not_matrices
    if is_matrix and own not in spec.not_maps:
        return ParameterRole("muon", True, spec.fused_rows().get(own))
    return ParameterRole("adamw", is_matrix, None)
