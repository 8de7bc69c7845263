"""A block: a mixer and a feed-forward, each with a norm and a residual connection."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.linear import adopt_linears
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.mlp import SwiGLU
from sleeptrain.model.norm import RMSNorm, sum_and_norm
from sleeptrain.model.state import Boundary, LayerState


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x). layer: the block's number in the whole model.

    With sandwich norms: x + norm(mixer(norm x)), then x + norm(mlp(norm x)). With `attention.post_norm`, attention
    blocks are x + norm(mixer x), then x + norm(mlp x). A block without a feed-forward is x + mixer(norm x). The
    residual multiplier scales each term that is added to x.
    """

    def __init__(self, layer: int, config: ModelConfig):
        super().__init__()
        norm = partial(RMSNorm, config.dim, config.norm_eps, config.norm)
        spec, self.has_mlp = block_spec(config, layer), layer not in config.mixer_only
        self.post_norm = self.has_mlp and config.attention.post_norm and not spec.recurrent
        self.sandwich = self.has_mlp and config.sandwich_norms
        self.residual_multiplier = config.residual_multiplier
        self.mixer_norm = norm()
        self.mixer = spec.module(config)
        if self.sandwich:
            self.mixer_post_norm = norm()
        if self.has_mlp:
            self.mlp_norm = norm()
            self.mlp = SwiGLU(config.dim, config.ffn_dim)
        if self.sandwich:
            self.mlp_post_norm = norm()
        adopt_linears(self)

    def forward(
        self,
        x_BTD: torch.Tensor,
        state: LayerState,
        layout: DocumentLayout,
        boundary: Boundary,
        state_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        """x_BTD, state -> (y_BTD, state). state_only: nobody reads the features: y is None, and the MLP is not run."""
        mixer_input = x_BTD
        if not self.post_norm:
            x_BTD, mixer_input = sum_and_norm(self.mixer_norm, x_BTD)
        y, state = self.mixer(mixer_input, state, layout, boundary, state_only)
        if y is None:
            return None, state
        if self.post_norm:
            x_BTD = self._add(x_BTD, self.mixer_norm(y))
            return self._add(x_BTD, self.mlp_norm(self.mlp(x_BTD))), state
        y = self._scaled(self.mixer_post_norm(y) if self.sandwich else y)
        if not self.has_mlp:
            return x_BTD + y, state
        x_BTD, mlp_input = sum_and_norm(self.mlp_norm, x_BTD, y)
        y = self.mlp(mlp_input)
        return self._add(x_BTD, self.mlp_post_norm(y) if self.sandwich else y), state

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self._scaled(y)

    def _scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.residual_multiplier == 1 else y * self.residual_multiplier
