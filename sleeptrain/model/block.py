"""A block: mixer and feed-forward, each behind a norm and around a residual."""

from __future__ import annotations

import torch
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.attention import Attention
from sleeptrain.model.gated_deltanet import GatedDeltaNet
from sleeptrain.model.layout import Layout
from sleeptrain.model.mamba2 import Mamba2
from sleeptrain.model.mlp import SwiGLU
from sleeptrain.model.norm import RMSNorm
from sleeptrain.model.state import Boundary, LayerState

MIXERS: dict[str, type[Attention | GatedDeltaNet | Mamba2]] = {
    "attention": Attention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x); with `attention.post_norm` attention blocks are x + norm(mixer x), then
    x + norm(mlp x). What is added is scaled by the residual multiplier."""

    def __init__(self, kind: str, config: ModelConfig):
        super().__init__()
        self.post_norm = kind == "attention" and config.attention.post_norm
        self.residual_multiplier = config.residual_multiplier
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps, config.norm)
        self.mixer = MIXERS[kind](config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps, config.norm)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)

    def forward(
        self, x_BTD: torch.Tensor, state: LayerState, layout: Layout, boundary: Boundary, state_only: bool = False
    ) -> tuple[torch.Tensor | None, LayerState]:
        """x_BTD, state -> (y_BTD, state). `state_only`: nobody reads the features; y is None, the MLP is not run."""
        read = x_BTD if self.post_norm else self.mixer_norm(x_BTD)
        y, state = self.mixer(read, state, layout, boundary, state_only)
        if y is None:
            return None, state
        if self.post_norm:
            x_BTD = self._add(x_BTD, self.mixer_norm(y))
            return self._add(x_BTD, self.mlp_norm(self.mlp(x_BTD))), state
        x_BTD = self._add(x_BTD, y)
        return self._add(x_BTD, self.mlp(self.mlp_norm(x_BTD))), state

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + (y if self.residual_multiplier == 1 else y * self.residual_multiplier)
