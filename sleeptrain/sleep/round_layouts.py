"""The layouts of a micro-batch's rounds, made on the CPU ahead of the rounds.

Where FlashAttention computes attention, a layout has the bounds of documents in place of a mask. A round does not read
the device, so all that the bounds depend on is known here: documents in the batch, and those of retained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from sleeptrain.config.mixers import is_recurrent
from sleeptrain.data.batch import PAD, Batch
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout, first_of_document, sleep_layout, window_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.attention import Attention
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.state import FastWeights, Retained
from sleeptrain.ops.document_attention import after_earlier_keys, first_of_stretch
from sleeptrain.sleep.rounds import Round


class RoundLayouts:
    """Makes the layout of each round of a batch.

    batch: on the CPU. model: the model, or the part that this process holds.
    sliding_window: of sliding eviction; None: hard eviction.
    retained_BC: the documents of the tokens that the memory before the first window retains (`retained_documents`).
    fixed_sizes: layouts have fixed sizes (`DocumentLayout.of_fixed_sizes`).
    """

    def __init__(
        self,
        batch: Batch,
        model: Hybrid,
        sliding_window: int | None = None,
        retained_BC: torch.Tensor | None = None,
        fixed_sizes: bool = False,
    ) -> None:
        self._documents_BT, self._starts_BT = batch.documents_BT, first_of_document(batch.documents_BT)
        self._model, self._sliding_window, self._fixed_sizes = model, sliding_window, fixed_sizes
        documents = batch.documents_BT
        self._num_carried = 0
        if retained_BC is not None:
            retained = torch.where(batch.carried_B[:, None], retained_BC, PAD)
            documents, self._num_carried = torch.cat([retained, documents], dim=1), retained.shape[1]
        self._with_bounds = reads_bounds(model) and consecutive(documents)
        self._before_BT = tokens_before(documents)[:, self._num_carried :]

    def of(self, r: Round) -> DocumentLayout:
        """The layout of a round, on the CPU."""
        layout = self._layout(r)
        return layout.of_fixed_sizes() if self._fixed_sizes else layout

    def _layout(self, r: Round) -> DocumentLayout:
        rows = None if len(r.rows) == self._documents_BT.shape[0] else torch.tensor(r.rows)

        def cut(t: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            part = t[:, start:stop]
            return part if rows is None else part.index_select(0, rows)

        documents = cut(self._documents_BT, r.start + r.skip, r.stop)
        if r.is_wake:
            layout = window_layout(documents, cut(self._starts_BT, r.start + r.skip, r.stop), self._with_bounds)
        else:
            layout = sleep_layout(documents, self._with_bounds)
        if layout.bounds is None or self._sliding_window is None or r.skip:
            return layout  # a pass that skips tokens reads documents that begin in its window
        # A sleep pass makes pads of documents that end inside the window.
        is_read = layout.documents_RL[:, 0] != PAD
        counts_R = torch.where(is_read, cut(self._before_BT, r.start, r.start + 1).squeeze(1), 0)
        if not bool(counts_R.any()):
            return layout
        lengths = sorted(self._retained_lengths(r))
        bounds = {n: after_earlier_keys(layout.bounds, counts_R.clamp(max=n), n) for n in lengths}
        return replace(layout, bounds_after=bounds)

    def _retained_lengths(self, r: Round) -> set[int]:
        """The numbers of tokens that attention layers retain before a round's window."""
        assert self._sliding_window is not None
        # The step before may have had another window.
        window = self._num_carried if r.window == 0 else self._sliding_window
        return {block_spec(self._model.config, layer).reach(window) for layer in _attention_layers(self._model)}


def reads_bounds(model: Hybrid) -> bool:
    """True if no mixer of this part of the model needs a mask of documents."""
    mixers = [cast(Block, model.blocks[layer]).mixer for layer in _attention_layers(model)]
    return all(isinstance(mixer, Attention) and mixer.reads_bounds for mixer in mixers)


def _attention_layers(model: Hybrid) -> list[int]:
    return [layer for layer in model.layers if not is_recurrent(model.config.layers[layer])]


def retained_documents(state: FastWeights) -> torch.Tensor | None:
    """The documents [B, C] of retained tokens in the layer that retains most, on the CPU; None if no layer retains any.

    It reads the device: a step calls it once, before its work is queued. The tokens that go on into a row's next window
    have the same documents in all layers; layers that retain fewer tokens retain the last of these.
    """
    documents = [layer.documents_BL for layer in state.layers if isinstance(layer, Retained)]
    return max(documents, key=lambda d: d.shape[1]).cpu() if documents else None


def carried_documents(rounds: Sequence[Round], state: FastWeights) -> torch.Tensor | None:
    """`retained_documents`, if the rounds begin with the first window: later windows follow windows of the batch."""
    return retained_documents(state) if rounds and rounds[0].window == 0 else None


def consecutive(documents_BT: torch.Tensor) -> bool:
    """True if the tokens of each document are consecutive in their row, as `Batch` wants them."""
    begins = first_of_stretch(documents_BT) & (documents_BT != PAD)
    row, position = begins.nonzero(as_tuple=True)
    return len({*zip(row.tolist(), documents_BT[row, position].tolist(), strict=True)}) == len(row)


def tokens_before(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: how many tokens of its document come directly before each token; 0 for pads."""
    position = torch.arange(documents_BT.shape[1])
    first = torch.where(first_of_stretch(documents_BT), position, 0).cummax(dim=1).values
    return torch.where(documents_BT != PAD, position - first, 0)
