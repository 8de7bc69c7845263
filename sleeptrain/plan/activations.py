"""Bytes that autograd saves in a round for its backward: counted by hand from the modules, tested against them.

Private functions count for one token of one row. `narrow` is the element size, in bytes, of matrix products and
attention: 2 under `train.precision=bf16`, else 4. In PyTorch norms, gates and convolutions save wide tensors (4 bytes);
GPU kernels save their arguments as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.model.block import Block
from sleeptrain.model.hybrid import rows_at_once
from sleeptrain.model.mixers.registry import block_spec, mixer_spec
from sleeptrain.model.mixers.spec import WIDE, Precision
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
    """

    model: ModelConfig
    narrow: int
    residual: int
    kernels: bool
    token_parts: int

    @staticmethod
    def of(config: Config, kernels: bool) -> Activations:
        parallel = config.parallel
        model, parts = local_config(config.model, parallel.tensor), parallel.token_parts
        return Activations(model, product_bytes(config.train), residual_bytes(config.train), kernels, parts)

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

    def fed_back(self, r: Round) -> int:
        """Bytes for the norm of the features that are fed back. In a round with a loss the head's norm counts them."""
        normed = self.model.norm_between_passes and not r.loss and not r.state_only
        saved = self._precision.normed(self.residual) * self.model.dim + WIDE
        return len(r.rows) * r.length * saved if normed else 0

    def head(self, num_targets: int) -> int:
        """Bytes for the last norm, the head and the loss."""
        m = self.model
        chunked = num_targets > rows_at_once(m.vocab_size)
        normed = self._precision.normed(self.residual) * m.dim + WIDE
        return num_targets * (normed + self.narrow * m.dim + (0 if chunked else WIDE * m.vocab_size))

    def logits(self, num_targets: int) -> int:
        """Peak bytes of the loss, in its backward: probabilities, and the gradients before and after the softmax."""
        vocab_size = self.model.vocab_size
        return 3 * WIDE * vocab_size * min(num_targets, rows_at_once(vocab_size))

    def copies(self, layers: range, head: bool) -> int:
        """Bytes of the narrow copies of these layers' matrices (`sleeptrain.model.linear`)."""
        if self.narrow == WIDE:
            return 0
        m = self.model
        return self.narrow * (sum(_matrix_elements(m, i) for i in layers) + head * m.vocab_size * m.dim)

    def _norm(self, element: int) -> int:
        """Bytes for a norm ahead of or behind a mixer or feed-forward; element: bytes of an element of its input."""
        return (self._precision.normed(element) * self.model.dim + WIDE) // self.token_parts

    @property
    def _precision(self) -> Precision:
        return Precision(self.narrow, self.kernels, self.residual)


def state_bytes(model: ModelConfig, kind: str) -> int:
    """Bytes of a layer's S for one row."""
    return WIDE * prod(mixer_spec(model, kind).state_shape)


def carried_bytes(config: Config, workload: Workload, model: ModelConfig, kind: str) -> int:
    """Bytes that a layer carries across a boundary for one row: S, and if set the convolution's tail or a window."""
    narrow, carry_conv = product_bytes(config.train), workload.settings.boundary.carry_conv
    return mixer_spec(model, kind).carried_bytes(narrow, workload.sliding_window or 0, carry_conv)


def _matrix_elements(model: ModelConfig, layer: int) -> int:
    """Number of weights in a block's linear layers."""
    with torch.device("meta"):
        block = Block(layer, model)
    return sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
