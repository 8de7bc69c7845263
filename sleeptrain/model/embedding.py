"""Rows of an embedding matrix, read in the compute dtype, with a gradient that is never narrower than fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sleeptrain.model.linear import MatrixReader
from sleeptrain.ops.add_product import add_rows, gradient_dtype


class LookUp(MatrixReader):
    """A module that reads rows of a matrix."""

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows [..., D] of the tokens (int64).

        With a compute dtype they are rounded to it, and then fp32 or wider. So the features are the same whether the
        matrix is stored in the compute dtype or in fp32.
        """
        if self.compute_dtype is None:
            return F.embedding(tokens, self.weight)
        rows: torch.Tensor = _LookUp.apply(tokens, self.weight, self.compute_dtype, self.gradient)
        return rows


class Embedding(LookUp, nn.Embedding):
    """`nn.Embedding` with a compute dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.look_up(input)


class _LookUp(torch.autograd.Function):
    """Adds the gradients of rows of one token in fp32, where autograd would add them in the matrix's dtype.

    They are added to `gradient` where there is one, and to no other rows: autograd would write one of its size first.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows, ctx.gradient = len(weight), gradient
        return F.embedding(tokens, weight).to(dtype).to(gradient_dtype(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        if ctx.gradient is not None:
            add_rows(ctx.gradient, tokens.flatten(), dy.flatten(0, -2))
            return None, None, None, None
        return None, torch.ops.aten.embedding_dense_backward(dy, tokens, ctx.num_rows, -1, False), None, None
