"""Which optimizer updates which parameter, and which matrices a fused projection holds."""

from __future__ import annotations

import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.optim.optimizers import ParameterRole


def parameter_roles(model: Hybrid) -> dict[str, ParameterRole]:
    """The role of each parameter, by name.

    Muon updates the blocks' matrices, each matrix of a fused projection by itself. AdamW updates embeddings, head,
    norms, convolutions and decay parameters. Weight decay acts only on matrices: zero is a meaningful value for a
    zero-centred norm, a decay parameter or a bias, so weight decay would change what they express.
    """
    return {name: _role(model, name, parameter) for name, parameter in model.named_parameters()}


def _role(model: Hybrid, name: str, parameter: torch.Tensor) -> ParameterRole:
    is_matrix = parameter.dim() == 2
    if not name.startswith("blocks."):
        return ParameterRole("adamw", is_matrix, None)
    block, _, local_name = name.removeprefix("blocks.").partition(".mixer.")
    if not local_name:  # a parameter of the feed-forward or a norm
        return ParameterRole("muon" if is_matrix else "adamw", is_matrix, None)
    spec = block_spec(model.config, int(block))
    is_matrix = is_matrix and local_name not in spec.not_matrices
    if is_matrix and local_name not in spec.not_maps:
        return ParameterRole("muon", True, spec.fused_rows().get(local_name))
    return ParameterRole("adamw", is_matrix, None)
