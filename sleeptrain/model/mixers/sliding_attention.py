"""Attention that sees less than a window: the last tokens only, as in Jet-Nemotron's `swa` layers."""

from __future__ import annotations

from dataclasses import replace

import torch

from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.mixers.attention import Attention, AttentionSpec
from sleeptrain.model.mixers.spec import Precision
from sleeptrain.model.state import Boundary, LayerState, Retained, WindowKV
from sleeptrain.ops.document_attention import fits_kernel


class SlidingAttention(Attention):
    """A token attends to the last `sliding_window` tokens of its document, itself included.

    Under hard eviction a token sees nothing before the window's start, as in all attention. Under sliding eviction the
    smaller of the two reaches counts.
    """

    def forward(
        self,
        x_BTD: torch.Tensor,
        state: LayerState,
        layout: DocumentLayout,
        boundary: Boundary,
        state_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        """x_BTD -> (y_BTD, state)."""
        reach = self.config.sliding_window
        if boundary.sliding_window is not None:
            boundary = replace(boundary, sliding_window=min(reach, boundary.sliding_window))
        return super().forward(x_BTD, state, layout.within(reach), boundary, state_only)

    def retained(self, full: WindowKV, rows_R: torch.Tensor) -> Retained:
        """The tokens of these rows' full windows that sliding eviction keeps: as many as the next window sees."""
        window, reach = super().retained(full, rows_R), self.config.sliding_window
        return Retained(window.k_BLGD[:, -reach:], window.v_BLGD[:, -reach:], window.documents_BL[:, -reach:])


class SlidingAttentionSpec(AttentionSpec):
    module = SlidingAttention

    def reach(self, tokens: int) -> int:
        return min(tokens, self.settings.sliding_window)

    def saved_mask_bytes(self, length: int, precision: Precision) -> int:
        """A number for each pair of tokens if the reach is shorter than the window; FlashAttention needs no mask."""
        c = self.settings
        by_bounds = precision.kernels and fits_kernel(precision.narrow, c.head_dim)
        return 0 if by_bounds or c.sliding_window >= length else precision.narrow * length**2
