"""Bytes that autograd saves in a round for its backward: counted by hand from the modules, tested against them.

Private functions count for one token of one row. `narrow` is the element size, in bytes, of matrix products and
attention: 2 under `train.precision=bf16`, else 4. In PyTorch norms, gates and convolutions save wide tensors (4 bytes);
GPU kernels save their arguments as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import nn

from sleeptrain.config.mixers import is_recurrent
from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import keeps_logits, rows_at_once
from sleeptrain.model.mixers.registry import block_spec, mixer_spec
from sleeptrain.model.mixers.spec import WIDE, Precision
from sleeptrain.ops.row_stacks import LARGE, STACKED
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.precision import product_bytes, residual_bytes
from sleeptrain.sleep.rounds import Round


@dataclass(frozen=True)
class Activations:
    """Counts for one process, in bytes.

    model: as one tensor rank holds it.
    narrow, residual: bytes of an element of products and attention, and of the features between blocks.
    kernels: recurrences, convolutions, norms and SwiGLU are flash-linear-attention's, as on a GPU; else PyTorch's.
    token_parts: number of parts into which `parallel.sequence` cuts the tokens between mixers.
    vocabulary_parts: number of tensor ranks over which the head's matrix is cut.
    """

    model: ModelConfig
    narrow: int
    residual: int
    kernels: bool
    token_parts: int
    vocabulary_parts: int

    @staticmethod
    def of(config: Config, kernels: bool) -> Activations:
        parallel = config.parallel
        model, parts = local_config(config.model, parallel.tensor), parallel.token_parts
        return Activations(
            model, product_bytes(config.train), residual_bytes(config.train), kernels, parts, parallel.tensor
        )

    def block(self, layer: int, r: Round, state_only: bool) -> int:
        """Bytes for a block in a round, over all rows of the round, with the S that the recurrence starts from."""
        length, m = r.length, self.model
        spec, has_mlp = block_spec(m, layer), layer not in m.mixer_only
        post_norm = has_mlp and m.attention.post_norm and not spec.recurrent
        norm = self._norm(self.narrow if post_norm else self.residual)
        token = norm + spec.saved_bytes(length, state_only, self._precision)
        if not state_only and has_mlp:
            hidden = 3 if self.kernels else 4  # gate, value and their product; in PyTorch the gate after SiLU too
            token += norm + self._precision.inputs(m.dim, 2) + hidden * m.ffn_dim * self.narrow
            token += 2 * self._norm(self.narrow) * m.sandwich_norms
        mask = 0 if state_only else spec.saved_mask_bytes(length, self._precision)
        return len(r.rows) * (length * token + state_bytes(m, m.layers[layer])) + mask

    def kept(self, layer: int, r: Round, state_only: bool) -> int:
        """Bytes that a block keeps under `sleep.recompute=selective`, besides its input features and S."""
        m, tokens = self.model, len(r.rows) * r.length
        to_state, to_features = self._product_widths[layer]
        width = to_state if state_only else to_state + to_features
        if self.token_parts > 1:  # the gathered input and the scattered output of the mixer and of the feed-forward
            regions = 1 if state_only or layer in m.mixer_only else 2
            width += regions * m.dim + (0 if state_only else regions * m.dim // self.token_parts)
        return tokens * (self.narrow * width + block_spec(m, layer).kept_bytes(state_only, self._precision))

    @cached_property
    def _product_widths(self) -> list[tuple[int, int]]:
        """The channels of each block's linear layers together: of those that its state needs, and of the others."""
        result = []
        for layer in range(len(self.model.layers)):
            state = {f"mixer.{name}" for name in block_spec(self.model, layer).state_layers}
            widths = {name: shape[0] for name, shape in self._matrices[layer].items()}
            to_state = sum(width for name, width in widths.items() if name in state)
            result.append((to_state, sum(widths.values()) - to_state))
        return result

    def features(self, r: Round) -> int:
        """Bytes of the features between blocks."""
        return len(r.rows) * r.length * self.model.dim * self.residual

    def fed_back(self, r: Round, head: bool) -> int:
        """Bytes for the norm of the features that are fed back. head: the round counts the head's norm of them."""
        normed = self.model.norm_between_passes and not head and not r.state_only
        saved = self._precision.normed(self.residual) * self.model.dim + WIDE
        return len(r.rows) * r.length * saved if normed else 0

    def head(self, num_targets: int, keep: bool) -> int:
        """Bytes for the last norm, the head and the loss, with the features that they read.

        keep: the mode of recomputation keeps logits. Tensor ranks that keep none keep the features alone.
        """
        m, width = self.model, WIDE if self.vocabulary_parts > 1 else self.narrow
        kept = keep and keeps_logits(num_targets, m.vocab_size, width)
        if not kept and self.vocabulary_parts > 1:
            return num_targets * m.dim * self.residual
        normed = self._precision.normed(self.residual) * m.dim + WIDE
        return num_targets * (normed + self.narrow * m.dim + WIDE + width * m.vocab_size * kept)

    def head_input(self, num_targets: int) -> int:
        """Bytes for the last norm where stages share the head, with what it returns."""
        saved = (self._precision.normed(self.residual) + self.narrow) * self.model.dim + WIDE
        return num_targets * saved

    def logits(self, num_targets: int, adds: bool) -> int:
        """Peak bytes of the loss beside what it saved, in its backward: of some rows, and the gradient of the matrix.

        PyTorch holds probabilities and the gradients before and after the softmax; a GPU's kernel works in place.
        adds: products add to the gradients of matrices (`working_copies`), on a GPU without a tensor between.
        """
        vocab_size, rows = self.model.vocab_size, rows_at_once(self.model.vocab_size, self.kernels)
        in_place = self.kernels and self.vocabulary_parts == 1
        each = self.narrow if in_place else 3 * WIDE
        return vocab_size * (min(num_targets, rows) * each + self._gradient_row(adds))

    def part_logits(self, num_targets: int, head_rows: int, adds: bool) -> int:
        """As `logits`, for a part of a shared head, beside the logits that it keeps. No kernel works on a part."""
        return head_rows * (min(num_targets, rows_at_once(head_rows)) * 3 * WIDE + self._gradient_row(adds))

    def _gradient_row(self, adds: bool) -> int:
        """Bytes of a row of the gradient of the head's matrix before it is added up."""
        return 0 if adds and self.kernels and self.narrow < WIDE else WIDE * self.model.dim

    def copies(self, layers: range, head_rows: int) -> int:
        """Bytes of the narrow copies of these layers' and the head's matrices (`sleeptrain.model.linear`)."""
        if self.narrow == WIDE:
            return 0
        elements = sum(prod(shape) for i in layers for shape in self._matrices[i].values())
        return self.narrow * (elements + head_rows * self.model.dim)

    def kept_rows(self, layers: range) -> int:
        """Bytes of the rows that short passes keep for the gradients of matrices (`stacking_rows`).

        An upper bound: products that share rows keep them once.
        """
        if self.narrow == WIDE or not self.kernels:
            return 0
        shapes = [shape for i in layers for shape in self._matrices[i].values()]
        return self.narrow * STACKED * sum(C + (D if C * D >= LARGE else 0) for C, D in shapes)

    @cached_property
    def _matrices(self) -> list[dict[str, torch.Size]]:
        """The shapes of each block's linear layers, by name. Blocks of one kind have the same."""
        m, known = self.model, dict[tuple[str, bool], dict[str, torch.Size]]()
        keys = [(kind, layer in m.mixer_only) for layer, kind in enumerate(m.layers)]
        for layer, key in enumerate(keys):
            if key not in known:
                known[key] = _matrices(m, layer)
        return [known[key] for key in keys]

    def _norm(self, element: int) -> int:
        """Bytes for a norm ahead of or behind a mixer or feed-forward; element: bytes of an element of its input."""
        return (self._precision.normed(element) * self.model.dim + WIDE) // self.token_parts

    @property
    def _precision(self) -> Precision:
        return Precision(self.narrow, self.kernels, self.residual)


def state_bytes(model: ModelConfig, kind: str) -> int:
    """Bytes of a layer's S for one row."""
    return WIDE * prod(mixer_spec(model, kind).state_shape)


def cuda_graph_bytes(model: ModelConfig, r: Round, residual: int) -> int:
    """Bytes of the tensors at the ends of a round's CUDA graphs: features and S, read and left, and their gradients.

    A wake pass also leaves its embeddings, a sleep pass reads the memory at the window's start. residual: bytes of an
    element of features.
    """
    state = len(r.rows) * sum(state_bytes(model, kind) for kind in model.layers if is_recurrent(kind))
    features = len(r.rows) * r.length * model.dim * residual
    read, written = state + features * (not r.is_wake), state + features * ((not r.state_only) + r.is_wake)
    return 2 * (read + written) + state * (not r.is_wake)


def carried_bytes(config: Config, workload: Workload, model: ModelConfig, kind: str) -> int:
    """Bytes that a layer carries across a boundary for one row: S, and if set the convolution's tail or a window."""
    narrow, carry_conv = product_bytes(config.train), workload.settings.boundary.carry_conv
    return mixer_spec(model, kind).carried_bytes(narrow, workload.sliding_window or 0, carry_conv)


def _matrices(model: ModelConfig, layer: int) -> dict[str, torch.Size]:
    """The shapes of a block's linear layers by the layers' names."""
    with torch.device("meta"):
        block = Block(layer, model)
    return {name: part.weight.shape for name, part in block.named_modules() if isinstance(part, nn.Linear)}
